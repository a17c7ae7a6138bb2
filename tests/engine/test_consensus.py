"""Decisions of several processes, played by threads: all read the same, or all hear what went wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.engine.distributed import groups  # noqa: E402
from cachepolicy.engine.distributed import meeting as meetings  # noqa: E402
from cachepolicy.engine.distributed.consensus import LENGTH, MOST_NORMS, Agreement  # noqa: E402
from cachepolicy.engine.distributed.norms import share  # noqa: E402
from cachepolicy.errors import PolicyError  # noqa: E402
from cachepolicy.planning.schedule import Tick  # noqa: E402
from cachepolicy.testing.models import Toy, failing, inputs, sample  # noqa: E402
from tests.support.exchange import Exchange, Thread, together  # noqa: E402

FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


def l1(*numbers: float) -> tuple[str, Any]:
    return "l1", share("l1", torch.tensor(numbers, dtype=torch.float64), None, by_sample=False)


def code(error: Any) -> str:
    assert isinstance(error, PolicyError), error
    return error.diagnostics[0].code


# --- norms -----------------------------------------------------------------------------------------------


def test_all_read_the_mean_of_all_pieces():
    """Pieces of one and of three elements."""

    def work(peers: Thread) -> Any:
        return Agreement(peers, "p").settle("here", [l1(4.0) if peers.rank else l1(1.0, 1.0, 2.0)])

    one, other = together(2, work)
    assert [2.0] == one.norms == other.norms
    assert 0 == one.refused == other.refused


def test_what_is_undefined_on_one_is_undefined_on_all():
    """A process without a share takes part, and the other norms of the decision are as they are."""

    def work(peers: Thread) -> Any:
        return Agreement(peers, "p").settle("here", [l1(3.0), l1(1.0) if peers.rank else ("l1", None), l1(math.nan)])

    for settled in together(3, work):
        assert 3.0 == settled.norms[0]
        assert all(map(math.isnan, settled.norms[1:]))


def test_refusals_are_counted():
    """Also in a decision without any norm."""
    counted = together(4, lambda peers: Agreement(peers, "p").settle("here", [], refuses=peers.rank > 1).refused)
    assert [2] * 4 == counted


@FEW
@given(count=st.integers(0, 3 * MOST_NORMS), rows=st.sampled_from([1, 2, 40]), lost=st.booleans())
def test_any_number_of_norms_and_samples_fits(count: int, rows: int, lost: bool):
    """More norms than one message holds go in several, more samples in a second one; a share that is missing on one
    process leaves the others in their places."""

    def work(peers: Thread) -> Any:
        wanted = [
            ("l1", share("l1", torch.full((rows, 1), float(place), dtype=torch.float64), None, by_sample=True))
            for place in range(count)
        ]
        if lost and count and not peers.rank:
            wanted[count // 2] = ("l1", None)
        return Agreement(peers, "p").settle("here", wanted).norms

    one, other = together(2, work)
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))
    expected = [float(place) for place in range(count)]
    if lost and count:
        assert math.isnan(one.pop(count // 2))
        expected.pop(count // 2)
    assert expected == one


def test_one_message_a_decision():
    """One norm, or as many as fit: one message of the same length; many samples: two."""
    lengths = list[int]()

    class Counting(Thread):
        def add(self, numbers: Sequence[float], subject: str) -> list[float]:
            lengths.append(len(numbers))
            return super().add(numbers, subject)

    alone = Agreement(Counting(Exchange(1), 0), "p")
    alone.settle("here", [l1(1.0)])
    alone.settle("here", [l1(1.0)] * MOST_NORMS)
    assert [LENGTH] * 2 == lengths
    alone.settle("here", [("l1", share("l1", torch.ones(100, 2), None, by_sample=True))])
    assert [LENGTH] * 3 + [600] == lengths


def test_different_numbers_of_samples_are_undefined():
    """No sample of one process is added to another's."""

    def work(peers: Thread) -> Any:
        part = share("l1", torch.ones(2 + peers.rank, 3), None, by_sample=True)
        return Agreement(peers, "p").settle("here", [("l1", part), l1(1.0)]).norms

    for norms in together(2, work):
        assert math.isnan(norms[0])
        assert 1.0 == norms[1]


def test_different_dtypes_are_read_alike():
    """The norm is not rounded then, on any process."""

    def work(peers: Thread) -> Any:
        dtype = torch.bfloat16 if peers.rank else torch.float32
        return Agreement(peers, "p").settle(
            "here", [("l1", share("l1", torch.ones(3, dtype=dtype), None, by_sample=False))]
        )

    assert [[1.0], [1.0]] == [settled.norms for settled in together(2, work)]


# --- what goes wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize("differing", ["subject", "past", "policy", "order", "trajectory", "number of norms"])
def test_processes_at_different_decisions_all_hear_of_it(differing: str):
    """Whatever it is that they do not have in common, nobody gets numbers, and all start anew together."""

    def work(peers: Thread) -> Any:
        other = peers.rank == 1
        if other and differing == "trajectory":
            Agreement(peers, "p")
        mine = Agreement(peers, "q" if other and differing == "policy" else "p")
        if other and differing == "order":
            mine._order = 5
        wanted = [l1(1.0)] * (2 if other and differing == "number of norms" else 1)
        with pytest.raises(PolicyError) as caught:
            mine.settle(
                "there" if other and differing == "subject" else "here",
                wanted,
                past="old" if other and differing == "past" else "new",
            )
        mine.abandon()  # nobody has to be told
        return code(caught.value), Agreement(peers, "p").settle("again", [l1(2.0)]).norms

    assert [("E351", [2.0])] * 3 == together(3, work)


@pytest.mark.parametrize("apart", [False, True])
def test_externals_that_decide_are_compared(apart: bool):
    """Processes that are given different numbers all hear of it before anything is decided."""

    def work(peers: Thread) -> Any:
        state: Any = SimpleNamespace(agreement=Agreement(peers, "p"), company=None)
        try:
            meetings.compare_externals(state, Tick(3), {"load": 1.0 + (apart and peers.rank)})
        except PolicyError as error:
            return code(error)
        return None

    assert ["E351" if apart else None] * 2 == together(2, work)


def test_a_failure_is_heard_at_the_next_decision():
    """Those who decide hear who failed, and the next trajectory goes as if nothing had been."""

    def work(peers: Thread) -> Any:
        first = Agreement(peers, "p")
        first.settle("the first step", [l1(1.0)])
        if peers.rank == 2:
            first.abandon()
            first.abandon()
        else:
            with pytest.raises(PolicyError, match="process 2 failed before the second step was decided") as caught:
                first.settle("the second step", [l1(1.0)])
            assert "E350" == code(caught.value)
            first.abandon()
        return Agreement(peers, "p").settle("the first step", [l1(3.0)]).norms

    assert [[3.0]] * 3 == together(3, work)


def test_several_failures_are_one():
    """Two of three fail at the same time."""

    def work(peers: Thread) -> Any:
        first = Agreement(peers, "p")
        if peers.rank:
            first.abandon()
        else:
            with pytest.raises(PolicyError, match="several processes failed"):
                first.settle("here", [l1(1.0)])
        return Agreement(peers, "p").settle("here", [l1(3.0)]).norms

    assert [[3.0]] * 3 == together(3, work)


def test_a_failure_after_the_last_decision_hurts_nobody():
    """The others have finished; in their next trajectory they pass over what they hear of the last one."""

    def work(peers: Thread) -> Any:
        first = Agreement(peers, "p")
        first.settle("the only step", [l1(1.0)])
        if peers.rank == 0:
            first.abandon()
        second = Agreement(peers, "p")
        return [second.settle("here", [l1(2.0)]).norms, second.settle("there", [l1(4.0)]).norms]

    assert [[[2.0], [4.0]]] * 2 == together(2, work)


def test_a_failure_of_another_session_is_remembered():
    """The decision that heard of it goes on; the trajectory that it was of ends where it next decides."""

    def work(peers: Thread) -> Any:
        one, two = Agreement(peers, "p"), Agreement(peers, "p")
        if peers.rank == 0:
            one.abandon()
            return two.settle("here", [l1(2.0)]).norms
        norms = two.settle("here", [l1(2.0)]).norms
        with pytest.raises(PolicyError, match="another process failed"):
            one.settle("there", [l1(1.0)])
        one.abandon()
        return norms

    assert [[2.0], [2.0]] == together(2, work)


def test_an_answer_that_never_comes_ends_the_trajectory():
    """Nothing is sent to a group that did not answer."""

    class Silent(Thread):
        def add(self, numbers: Sequence[float], subject: str) -> list[float]:
            raise PolicyError.of("E352", subject)

    peers = Silent(Exchange(2), 0)
    alone = Agreement(peers, "p")
    with pytest.raises(PolicyError, match="here"):
        alone.settle("here", [])
    alone.abandon()
    assert 0 == peers.sent


def test_a_group_needs_processes_that_were_started():
    """Before torch.distributed runs, a group is refused, and False and None are as none."""
    model = Toy(blocks=3).build()
    with pytest.raises(PolicyError, match="has not been initialised") as caught:
        cachepolicy.apply(model, POLICY, process_group=object())
    assert "E309" == code(caught.value)
    for nobody in (None, False):
        assert groups.peers_of(nobody, model) is None
    assert groups.holders_of(model) is None


# --- on a model ------------------------------------------------------------------------------------------

POLICY = cachepolicy.parse("""
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= 0.15 -> reuse residual
""")
TIMESTEPS = (950.0, 900.0, 850.0, 600.0, 550.0, 500.0, 450.0, 100.0)


@pytest.fixture
def meeting(monkeypatch):
    """`apply(..., process_group=thread)` decides with the other threads."""
    monkeypatch.setattr(meetings, "peers_of", lambda given, _, known=False: given or None)
    monkeypatch.setattr("cachepolicy.engine.apply.member_ranks", lambda given: given.ranks)


def run(peers: Any, policy: Any = POLICY, *, half: int | None = None, model: Any = None, **options: Any) -> Any:
    """The rows of a run on one part of two independent samples; `half` is the part (None: both)."""
    model = Toy(blocks=3).build() if model is None else model
    x, y = inputs(Toy(), batch=2)
    if half is not None:
        x, y = x[half : half + 1], y[half : half + 1]
    with torch.no_grad(), cachepolicy.apply(model, policy, process_group=peers, **options) as attached:
        outputs = list(sample(model, TIMESTEPS, x, y))
        return attached.trace.rows(), outputs, attached.trace.last


POLICIES = {
    "on the way": POLICY,
    "each block by itself": cachepolicy.parse("""
signal x = output(blocks[0])
signal drift = relative_l1(x, kept(x))
match each blocks[1:] while drift <= 0.15 -> reuse
"""),
    "accumulated": cachepolicy.parse("""
signal x = input(blocks[0])
signal change = l1(x, prev(x)) + 0.01 * cosine(x, kept(x))
match blocks when step > 0 while sum(change) < 0.3 -> reuse residual
"""),
    "inside the first block": cachepolicy.parse(r"""
signal x = output("^blocks\.0\.norm$")
signal change = l2(x, prev(x))
match blocks while sum(change) < 1.4 -> reuse residual
"""),
    "of the model": cachepolicy.parse("""
signal x = input(model)
signal v = output(model)
signal rate = l1(kept(v), kept(v, 2)) / l1(kept(x), kept(x, 2))
signal change = rate * l1(x, prev(x)) / l1(kept(v))
match model when 2 <= step while sum(change) < 0.5 -> reuse residual
"""),
    "remembered numbers": cachepolicy.parse("""
signal x = input(blocks[0])
signal change = l1(x, prev(x))
signal growth = change - 0.9 * prev(change) + 0.1 * kept(l2(x))
match blocks[1:] while growth < 0.35 -> reuse residual
"""),
    "nested": cachepolicy.parse(r"""
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= 0.1 -> reuse residual
match attention and not "^blocks\.0" while 0.05 < drift <= 0.25 -> reuse
"""),
}


@pytest.mark.parametrize("samples", ["mean", "max"])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore:the policy reused nothing")
def test_parts_decide_as_the_whole(meeting, name: str, samples: str):
    """Two threads with a sample each decide what one run over both does, and their outputs are its rows. With
    `max`, where samples stay whole in a process, both have to hold them all."""
    rows, outputs, last = run(False, POLICIES[name], samples=samples)

    def part(peers: Thread) -> Any:
        return run(peers, POLICIES[name], half=peers.rank if samples == "mean" else None, samples=samples)

    for half, got in enumerate(together(2, part)):
        if isinstance(got, BaseException):
            raise got
        assert rows == got[0]
        assert last.facts == got[2].facts
        for whole, mine in zip(outputs, got[1], strict=True):
            expected = whole[half : half + 1] if samples == "mean" else whole
            torch.testing.assert_close(expected, mine)
    assert {"C", "R"} <= set("".join(rows.values())) or name == "of the model"


@pytest.mark.parametrize("name", POLICIES)
def test_static_and_unshared_runs_say_nothing(meeting, name: str):
    """Without peers there is no message; with peers, none for a policy that reads no signals."""
    run(False, POLICIES[name])
    alone = Thread(Exchange(2), 0)
    run(alone, cachepolicy.parse("match attention every 2 -> reuse"))
    assert 0 == alone.sent


SIGNALS = """
signal x = output(blocks[0])
signal drift = relative_l1(x, kept(x))
signal size = l1(x)
"""
FORMS = {
    "each block by itself": "match each blocks[1:] while {} <= 99 -> reuse",
    "a span": "match blocks[1:] while {} <= 99 -> reuse residual",
}


@pytest.mark.parametrize(
    ("form", "lost"),
    # The residuals of a span are nobody else's to write into.
    [("each block by itself", "written into"), *itertools.product(FORMS, ["nan", "another dtype", "another length"])],
)
def test_what_one_cannot_reuse_nobody_reuses(meeting, form: str, lost: str):
    """A NaN, another dtype or length, or a history that was written into, on one thread alone: both compute there, each
    says why, and both go on reusing."""

    def part(peers: Thread) -> Any:
        model = Toy(blocks=3).build()
        x, y = (each[peers.rank :][:1] for each in inputs(Toy(), batch=2))
        policy = cachepolicy.parse(SIGNALS + FORMS[form].format("drift" if lost == "nan" else "size"))
        with torch.no_grad(), cachepolicy.apply(model, policy, process_group=peers) as attached:
            for step, t in enumerate(TIMESTEPS):
                given = x
                if peers.rank == 1 and step == 4:
                    given = {"nan": x * math.nan, "another dtype": x.double(), "another length": x[:, :3]}.get(lost, x)
                    model.to(given.dtype)
                    if lost == "written into":
                        (state,) = attached._sessions.alive()[0].states.values()
                        for slot in next(iter(state.branches.values())).slots:
                            slot.output.add_(0)
                model(given, torch.tensor(t), y.to(given.dtype))
                model.to(x.dtype)
            return attached.trace.rows(), {
                fact for (_, step, _), fact in attached.trace.last.facts.items() if step == 4
            }

    one, other = together(2, part)
    assert one[0] == other[0]
    # What was kept of another form fits the next step no more than the step before fitted it.
    assert {"CRRRCRRR" if lost == "written into" else "CRRRCCRR"} == set(one[0].values())
    if lost != "nan":
        assert {"another process could not reuse"} == one[1]
        assert one[1] != other[1]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore:the policy reused nothing")
def test_parameters_in_pieces_are_used_by_all_or_none(meeting, monkeypatch, name: str):
    """Each thread measures samples of its own; a site is reused where both would, and where they part it says so."""
    monkeypatch.setattr(meetings, "peers_of", lambda given, _, known=False: None)

    monkeypatch.setattr(
        meetings, "holders_of", lambda model, known=False: next(each for each in met if each.model is model)
    )
    met = list[Any]()

    def joined(peers: Thread) -> Any:
        peers.model = Toy(blocks=3).build()
        met.append(peers)
        return run(peers, POLICIES[name], half=peers.rank, model=peers.model)

    one, other = together(2, joined)
    assert one[0] == other[0]
    assert {"C", "R"} <= set("".join(one[0].values())) or name == "of the model"
    had_to = [{place for place, fact in each[2].facts.items() if fact.startswith("another")} for each in (one, other)]
    assert any(had_to) or name != "on the way"
    assert not had_to[0] & had_to[1]


def test_each_deciding_for_itself_is_told_apart(meeting):
    """The parts of this file's samples would decide differently, each by itself: what is tested above is not luck."""
    apart = [run(False, POLICY, half=half)[0] for half in (0, 1)]
    assert apart[0] != apart[1]


def test_a_thread_that_raises_ends_the_other(meeting):
    """In its forward, or in its clock: the other hears of it at its next decision, and both run again."""

    def part(peers: Thread) -> Any:
        model = failing(Toy(blocks=3).build(), [3] if peers.rank else [])
        x, y = inputs(Toy())
        times = iter([*TIMESTEPS[:2], *([RuntimeError()] if peers.rank else TIMESTEPS[2:])])

        def timestep() -> float:
            t = next(times)
            if isinstance(t, RuntimeError):
                raise t
            return t

        heard = list[Any]()
        for clock in (None, timestep):
            with torch.no_grad(), cachepolicy.apply(model, POLICY, process_group=peers, timestep=clock):
                with pytest.raises(Exception, match=r"process 1 failed|the forward failed|^$") as caught:
                    list(sample(model, TIMESTEPS, x, y))
                heard.append(code(caught.value) if isinstance(caught.value, PolicyError) else "own")
        with torch.no_grad(), cachepolicy.apply(model, POLICY, process_group=peers) as attached:
            list(sample(model, TIMESTEPS, x, y))
            return heard, attached.trace.rows()

    one, other = together(2, part)
    assert ["E350", "E350"] == one[0]
    assert ["own", "own"] == other[0]
    assert one[1] == other[1]


def test_a_pipeline_that_fails_outside_its_model_is_heard(meeting):
    """Here its scheduler raises on one thread."""

    class Pipeline:
        def __init__(self, rank: int) -> None:
            self.transformer = Toy(blocks=3).build()
            self.components = {"transformer": self.transformer}
            self.rank = rank

        def __call__(self) -> None:
            x, y = inputs(Toy())
            for step, t in enumerate(TIMESTEPS):
                self.transformer(x, torch.tensor(t), y)
                if step == 3 and self.rank:
                    raise KeyboardInterrupt

    def part(peers: Thread) -> Any:
        pipeline = Pipeline(peers.rank)
        with torch.no_grad(), cachepolicy.apply(pipeline, POLICY, process_group=peers):
            try:
                pipeline()
            except (PolicyError, KeyboardInterrupt) as error:
                return error

    one, other = together(2, part)
    assert "E350" == code(one)
    assert isinstance(other, KeyboardInterrupt)


def test_a_step_too_many_is_noticed(meeting):
    """One thread runs a step more than the other, which starts its next trajectory: both are told."""

    def part(peers: Thread) -> Any:
        model = Toy(blocks=3).build()
        x, y = inputs(Toy())
        with torch.no_grad(), cachepolicy.apply(model, POLICY, process_group=peers):
            with pytest.raises(PolicyError) as caught:
                list(sample(model, (*TIMESTEPS[: 4 + peers.rank], *TIMESTEPS), x, y))
            return caught.value

    for error in together(2, part):
        assert "E351" == code(error)
        assert "deci" in str(error)
