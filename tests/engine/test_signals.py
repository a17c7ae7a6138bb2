"""Signals on live models are what an independent computation makes of the same tensors, and decide what it decides.

Published methods are run on tiny models, and beside each a few lines of plain torch that follow its paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cachepolicy  # noqa: E402
from cachepolicy.testing import checks, models  # noqa: E402
from tests.support import zoo  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TIMESTEPS = (950.0, 880.0, 780.0, 720.0, 650.0, 520.0, 400.0, 300.0, 200.0, 100.0)
STEPS = len(TIMESTEPS)

FEW = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


class Recorder:
    """The first tensors that modules were given and gave, a list each; only what really ran is in it."""

    def __init__(self, model: nn.Module, *names: str) -> None:
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in names}
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._note(name), with_kwargs=True)

    def _note(self, name: str) -> Callable[..., None]:
        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = kwargs.get("hidden_states", args[0] if args else None)
            self.inputs[name].append(given.clone())
            self.outputs[name].append((output[0] if isinstance(output, tuple) else output).clone())

        return note


def _l1(x: Tensor, y: Tensor | None = None) -> float:
    return float((x if y is None else x - y).abs().mean())


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().mean() / y.abs().mean())


@torch.no_grad()
def _loop(name: str, model: Any, seed: int = 0) -> list[Tensor]:
    return list(zoo.trajectory(name, model, TIMESTEPS, seed=seed))


def _measured(trajectory: Any, signal: str) -> list[float | None]:
    """The signal at each call, None where no site asked for it."""
    return [next((each[signal] for each in call.signals.values() if signal in each), None) for call in trajectory.calls]


def _apply(model: nn.Module, text: str, **options: Any) -> Any:
    return cachepolicy.apply(model, cachepolicy.parse(text), steps=STEPS, **options)


# --- TeaCache --------------------------------------------------------------------------------------------

TEACACHE = r"""
param threshold: float = 1.0
signal modulated = output("^(transformer_)?blocks\.0\.norm1$")
signal change = poly([0.8, 0.05], relative_l1(modulated, prev(modulated)))
match blocks when 0 < step < steps - 1 while sum(change) < threshold -> reuse residual
"""


def _teacache(modulated: Sequence[Tensor], threshold: float) -> tuple[str, list[float]]:
    """TeaCache's rule (arXiv:2411.19108): accumulate the rescaled change since the last compute."""
    row, changes, total = "C", [], 0.0
    for step in range(1, len(modulated)):
        changes.append(0.8 * _relative(modulated[step], modulated[step - 1]) + 0.05)
        total += changes[-1]
        reuses = total < threshold and step < len(modulated) - 1
        row += "R" if reuses else "C"
        total = total if reuses else 0.0
    return row, changes


@pytest.mark.parametrize("name", ["dit", "pixart", "wan", "flux", "mochi"])
@FEW
@given(threshold=st.floats(0.1, 4.0))
def test_teacache_decides_as_its_paper_says(name: str, threshold: float) -> None:
    """Measured at a norm inside the first block, against the step before, accumulated since the last compute; where
    the rule reuses, nothing of the block behind the norm has run."""
    model = zoo.build(name)
    blocks = "blocks" if name == "wan" else "transformer_blocks"
    attention = {"wan": "attn1", "flux": "attn", "mochi": "attn1"}.get(name, "attn1")
    seen = Recorder(model, f"{blocks}.0.norm1")
    ran = models.Probes(model)
    with _apply(model, TEACACHE, threshold=threshold) as run:
        _loop(name, model)
        (trajectory,) = run.trace
    row, changes = _teacache(seen.outputs[f"{blocks}.0.norm1"], threshold)
    assert set(trajectory.rows().values()) == {row}
    measured = _measured(trajectory, "change")
    assert [each for each in measured[1:-1] if each is not None] == pytest.approx(changes[:-1], rel=1e-5)
    counts = ran.take()
    assert counts[f"{blocks}.0.norm1"] == STEPS
    assert counts[f"{blocks}.0.{attention}"] == row.count("C")
    assert counts[f"{blocks}.1"] == row.count("C")
    checks.well_formed(trajectory)
    checks.trace_agrees(trajectory)


# --- EasyCache -------------------------------------------------------------------------------------------

EASYCACHE = """
param threshold: float = 0.5
signal x = input(model)
signal v = output(model)
signal rate = l1(kept(v), kept(v, 2)) / l1(kept(x), kept(x, 2))
signal change = rate * l1(x, prev(x)) / l1(kept(v))
match model when 2 <= step < steps - 1 while sum(change) < threshold -> reuse residual
"""


class EasyCache:
    """EasyCache as its paper has it (arXiv:2507.02860), around a model."""

    def __init__(self, model: Any, latent: str, threshold: float) -> None:
        self.model, self.latent, self.threshold = model, latent, threshold
        self.step, self.total, self.row = -1, 0.0, ""
        self.xs: list[Tensor] = []
        self.computed: list[tuple[Tensor, Tensor]] = []

    def __call__(self, **arguments: Any) -> tuple[Tensor]:
        self.step += 1
        x = arguments[self.latent]
        self.xs.append(x)
        if 2 <= self.step < STEPS - 1 and len(self.computed) >= 2:
            (newest, v), (older, before) = self.computed[-1], self.computed[-2]
            rate = _l1(v, before) / _l1(newest, older)
            self.total += rate * _l1(x, self.xs[-2]) / _l1(v)
            if self.total < self.threshold:
                self.row += "R"
                return (x + (v - newest),)
        self.total = 0.0
        output = zoo.output(self.model(**arguments))
        self.computed.append((x, output))
        self.row += "C"
        return (output,)


@pytest.mark.parametrize("name", ["wan", "sd3", "flux"])
@FEW
@given(threshold=st.floats(0.05, 3.0))
def test_easycache_decides_and_answers_as_its_paper_says(name: str, threshold: float) -> None:
    """`kept(x, 2)` is two computes back, `prev(x)` the step before, whether that computed or not."""
    reference = EasyCache(zoo.build(name), zoo.entry(name).latent, threshold)
    expected = _loop(name, reference)
    with _apply(zoo.build(name), EASYCACHE, threshold=threshold) as run:
        got = _loop(name, run.target)
        (trajectory,) = run.trace
    assert trajectory.rows() == {"model": reference.row}
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    checks.trace_agrees(trajectory)


# --- TaylorSeer ------------------------------------------------------------------------------------------

TAYLORSEER = """
match attention or feedforward when step >= 3 every 3 since compute -> predict taylor(order: ORDER)
"""


class Taylor:
    """TaylorSeer as its paper has it (arXiv:2503.06923), on modules that are wrapped by hand."""

    def __init__(self, model: nn.Module, names: Sequence[str], order: int) -> None:
        self.step, self.order = -1, order
        for name in names:
            module = model.get_submodule(name)
            module.forward = self.wrap(module.forward)

    def wrap(self, forward: Any) -> Any:
        factors: list[tuple[Tensor, ...]] = []
        last = [-1]

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            age = self.step - last[0]
            if self.step >= 3 and age < 3:
                terms = [
                    tuple(term * age**power / (1, 1, 2, 6)[power] for term in each)
                    for power, each in enumerate(factors)
                ]
                answers = tuple(sum(each[1:], each[0]) for each in zip(*terms, strict=True))
                return answers if len(answers) > 1 else answers[0]
            output = forward(*args, **kwargs)
            updated = [output if isinstance(output, tuple) else (output,)]
            for old in factors[: self.order]:
                updated.append(tuple((a - b) / age for a, b in zip(updated[-1], old, strict=True)))
            factors[:], last[0] = updated, self.step
            return output

        return wrapped

    def steps(self) -> Iterator[float]:
        for self.step, t in enumerate(TIMESTEPS):
            yield t


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["dit", "wan", "sd3", "flux"])
def test_taylorseer_predicts_as_its_paper_says(name: str, order: int) -> None:
    """Recursive differences of computed results, over whatever gap lay between them."""
    policy = TAYLORSEER.replace("ORDER", str(order))
    with _apply(zoo.build(name), policy) as run:
        sites = [site.name for site in run.plan.sites]
        got = _loop(name, run.target)
        rows = set(run.trace.rows().values())
    assert rows == {"CCCRRCRRCR"}
    model = zoo.build(name)
    reference = Taylor(model, sites, order)
    with torch.no_grad():
        expected = list(zoo.trajectory(name, model, reference.steps()))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- DBCache ---------------------------------------------------------------------------------------------

DBCACHE = """
param threshold: float = 0.3
signal head = residual(blocks[0:2])
signal drift = relative_l1(head, kept(head))
match blocks[2:] when step >= 2 while drift < threshold at most 3 in a row -> predict taylor(order: 1) of residual
"""


def _dbcache(heads: Sequence[Tensor], threshold: float) -> tuple[str, list[int]]:
    """DBCache's rule: the head against itself at the last compute, and a bound on hits in a row."""
    row, computes = "", list[int]()
    for step, head in enumerate(heads):
        hit = step >= 2 and _relative(head, heads[computes[-1]]) < threshold and step - computes[-1] <= 3
        row += "R" if hit else "C"
        if not hit:
            computes.append(step)
    return row, computes


@pytest.mark.parametrize("name", ["wan", "dit", "hunyuan_dit", "wan_animate"])
@FEW
@given(threshold=st.floats(0.05, 1.5))
def test_dbcache_decides_and_answers_as_its_authors_code(name: str, threshold: float) -> None:
    """The residual of several blocks is measured, and that of the others predicted from the last two computes."""
    model = zoo.build(name)
    blocks = "transformer_blocks" if name == "dit" else "blocks"
    count = len(model.get_submodule(blocks))
    seen = Recorder(model, *(f"{blocks}.{index}" for index in range(count)))
    after = Recorder(model, "norm_out") if hasattr(model, "norm_out") else None
    with _apply(model, DBCACHE, threshold=threshold) as run:
        _loop(name, model)
        (trajectory,) = run.trace
    heads = [b - a for a, b in zip(seen.inputs[f"{blocks}.0"], seen.outputs[f"{blocks}.1"], strict=True)]
    assert len(heads) == STEPS
    row, computes = _dbcache(heads, threshold)
    assert set(trajectory.rows().values()) == {row}
    assert len(seen.outputs[f"{blocks}.{count - 1}"]) == row.count("C")
    checks.trace_agrees(trajectory)
    if after is None or name in {"hunyuan_dit", "wan_animate"}:
        return
    last = f"{blocks}.{count - 1}"
    kept = [seen.outputs[f"{blocks}.1"][step] for step in computes]
    tails = {step: b - a for step, a, b in zip(computes, kept, seen.outputs[last], strict=True)}
    for step, letter in enumerate(row):
        if letter == "R":
            known = [each for each in computes if each < step][-2:]
            newest = tails[known[-1]]
            slope = (newest - tails[known[0]]) / max(1, known[-1] - known[0])
            expected = seen.outputs[f"{blocks}.1"][step] + newest + slope * (step - known[-1])
            torch.testing.assert_close(after.inputs["norm_out"][step], expected, rtol=1e-4, atol=1e-4)


# --- memory, norms and accumulators on toys --------------------------------------------------------------

TOY = models.Toy(blocks=3)


def _sampled(model: Any, *, branches: int = 1, timesteps: Sequence[float] = TIMESTEPS) -> None:
    x, y = models.inputs(TOY)
    ys = [y + number for number in range(branches)]
    with torch.no_grad():
        list(models.sample(model, timesteps, x, ys if branches > 1 else y))


NORMS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "l1(x, y)": _l1,
    "l2(x, y)": lambda x, y: float((x - y).square().mean().sqrt()),
    "relative_l1(x, y)": _relative,
    "cosine(x, y)": lambda x, y: float(nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0)),
    "differing(x, y)": lambda x, y: float((x != y).float().mean()),
    "l1(x) - l2(y)": lambda x, y: _l1(x) - float(y.square().mean().sqrt()),
}


@pytest.mark.parametrize("memory", ["prev", "kept"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_and_memories_are_as_defined(norm: str, memory: str) -> None:
    """`prev` is the step before; `kept` the last compute of the site, for whatever reason it computed."""
    policy = f"""
signal x = output(blocks[0])
signal y = {memory}(x)
signal number = {norm.replace("(x, y)", f"(x, {memory}(x))").replace("l2(y)", f"l2({memory}(x))")}
match blocks[1:] while number > -1000 at most 2 in a row -> reuse residual
""".replace(f"signal y = {memory}(x)\n", "")
    model = TOY.build()
    seen = Recorder(model, "blocks.0")
    with _apply(model, policy) as run:
        _sampled(model)
        (trajectory,) = run.trace
    outputs = seen.outputs["blocks.0"]
    row = next(iter(trajectory.rows().values()))
    # Where `number` has no value yet the site computes, and then at every third step.
    assert row == "CRRCRRCRRC"
    for step, measured in enumerate(_measured(trajectory, "number")):
        if step == 0:
            continue
        past = step - 1 if memory == "prev" else row[:step].rindex("C")
        assert measured == pytest.approx(NORMS[norm](outputs[step], outputs[past]), rel=1e-5, abs=1e-6)


DECLARATIONS = [
    "signal head = residual(blocks[0])",
    "signal drift = relative_l1(head, kept(head))",
    "signal change = drift + 0.5 * prev(drift)",
    "signal rate = max(drift, change)",
]
RULES = [
    "match blocks[1:] when step % 2 == 0 while rate < 0.6 -> reuse residual",
    "match blocks[1:] while sum(change) < 2 at most 3 in a row -> reuse residual",
]


@given(st.permutations(range(len(DECLARATIONS))), st.booleans())
def test_the_order_of_declarations_changes_nothing(order: list[int], below: bool) -> None:
    """A signal that is read above its declaration is measured, decides and is simulated like one read below it."""
    shuffled = [DECLARATIONS[number] for number in order]
    runs = list[Any]()
    for lines in ([*DECLARATIONS, *RULES], [*RULES, *shuffled] if below else [*shuffled, *RULES]):
        model = TOY.build()
        with _apply(model, "\n".join(lines)) as run:
            _sampled(model)
            runs.append(run)
    expected, got = (next(iter(run.trace)) for run in runs)
    assert "R" in "".join(expected.rows().values())
    assert expected.rows() == got.rows()
    assert repr([call.signals for call in expected.calls]) == repr([call.signals for call in got.calls])
    assert runs[0].plan.resolved.digest == runs[1].plan.resolved.digest
    read = {name: _measured(got, name) for name in ("change", "rate")}
    measured = {name: [math.nan if each is None else each for each in numbers] for name, numbers in read.items()}
    simulated = cachepolicy.simulate(runs[1].plan, steps=STEPS, timesteps=TIMESTEPS, signals=measured)
    assert expected.rows() == simulated.rows


def test_a_measure_at_an_argument_and_at_the_way_in() -> None:
    """`argument(S, "name")` and `input(S)` are what the module is called with."""
    policy = """
signal step_embedding = argument(blocks[0], "step")
signal states = input(blocks[1])
signal a = l1(step_embedding)
signal b = l2(states)
match blocks[1:] while a + b > -1 at most 2 in a row -> reuse residual
"""
    model = TOY.build()
    seen = Recorder(model, "embed", "blocks.0")
    with _apply(model, policy) as run:
        _sampled(model)
        (trajectory,) = run.trace
    assert trajectory.rows() == {"blocks[1:3]": "CRRCRRCRRC"}
    for step, (a, b) in enumerate(zip(_measured(trajectory, "a"), _measured(trajectory, "b"), strict=True)):
        assert a == pytest.approx(_l1(seen.outputs["embed"][step]), rel=1e-5)
        assert b == pytest.approx(float(seen.outputs["blocks.0"][step].square().mean().sqrt()), rel=1e-5)


@FEW
@given(limit=st.floats(0.0, 2.0), branches=st.integers(1, 3))
def test_sums_run_since_the_last_compute_on_each_branch(limit: float, branches: int) -> None:
    """An accumulator starts anew with each compute and has a value of its own on each branch."""
    policy = """
param limit: float = 1.0
signal x = output(blocks[0])
signal change = relative_l1(x, prev(x))
match blocks[1:] while sum(change) < limit -> reuse residual
"""
    model = TOY.build()
    seen = Recorder(model, "blocks.0")
    with _apply(model, policy, limit=limit) as run:
        _sampled(model, branches=branches)
        (trajectory,) = run.trace
    for number, branch in enumerate(trajectory.branches):
        outputs, row, total = seen.outputs["blocks.0"][number::branches], "C", 0.0
        for step in range(1, STEPS):
            total += _relative(outputs[step], outputs[step - 1])
            row += "R" if total < limit else "C"
            total = total if row[-1] == "R" else 0.0
        assert set(trajectory.rows(branch).values()) == {row}
    checks.well_formed(trajectory)
    checks.trace_agrees(trajectory)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("returns", ["tensor", "tuple", "list", "dict"])
def test_what_is_measured_depends_on_no_form(returns: Any, in_place: bool) -> None:
    """Blocks that return streams in a tuple, list or dict, or write in place, are measured as plain ones are."""
    plain, other = models.Toy(blocks=3), models.Toy(blocks=3, returns=returns, in_place=in_place)
    found = []
    for toy in (plain, other):
        model = toy.build()
        x, y = models.inputs(toy)
        with cachepolicy.apply(model, "fbc", threshold=0.2) as run, torch.no_grad():
            list(models.sample(model, TIMESTEPS, x, y))
            found.append(_measured(run.trace.last, "drift")[1:])
    if returns == "tensor":
        assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert all(number is not None and number >= 0 for number in found[1])


def test_a_probe_is_measured_where_its_rule_does_not_hold() -> None:
    """`prev` at the first step at which `when` holds is the step before, though no rule asked then."""
    policy = """
signal x = output(blocks[0])
signal change = relative_l1(x, prev(x))
match blocks[1:] when step >= 4 while change < 1000 -> reuse residual
"""
    model = TOY.build()
    with _apply(model, policy) as run:
        _sampled(model)
        assert run.trace.rows() == {"blocks[1:3]": "CCCC" + "R" * (STEPS - 4)}


@pytest.mark.parametrize("name", ["dit", "wan", "cogvideox", "flux", "hunyuan_video", "sd3"])
@FEW
@given(threshold=st.floats(0.05, 2.0), seed=st.integers(0, 2))
def test_the_simulator_given_the_measured_numbers_decides_the_same(name: str, threshold: float, seed: int) -> None:
    """A run can be told again without the model, from its clock, its numbers and its facts."""
    policy = cachepolicy.load("fbc")
    with cachepolicy.apply(zoo.build(name, seed), policy, threshold=threshold) as run:
        _loop(name, run.target, seed)
        trajectory, skeleton = run.trace.last, run.plan.skeleton
    numbers = [float("nan") if each is None else each for each in _measured(trajectory, "drift")]
    again = cachepolicy.simulate(
        policy,
        steps=STEPS,
        timesteps=[call.tick.t for call in trajectory.calls],
        skeleton=skeleton,
        signals={"drift": numbers},
        facts=trajectory.facts,
        threshold=threshold,
    )
    assert again.rows == trajectory.rows()
    checks.trace_agrees(trajectory)


def test_kept_reaches_as_far_back_as_the_language_lets_it() -> None:
    """`kept(x, n)` has a value after n computes, for every n that the checker takes."""
    policy = cachepolicy.parse("match attention while kept(step, 6) >= 0 -> reuse\n")
    rows = cachepolicy.simulate(policy, steps=9).rows
    assert set(rows.values()) == {"CCCCCCRRR"}


@pytest.mark.parametrize(
    "norm", ["l1(x, kept(x))", "relative_l1(x, prev(x))", "cosine(x, kept(x, 2))", "kept(l2(x)) / l2(x)"]
)
@pytest.mark.parametrize("limit", [0.9, 1.0, 1.1, 1e6])
def test_a_norm_in_a_while_decides_as_a_signal_of_it_does(norm: str, limit: float) -> None:
    """A rule may take the norm of a signal itself. It was undefined in a run, so that the rule never reused."""
    rule = "signal x = residual(blocks[0])\n{}match blocks[1:] while {} < {} at most 3 in a row -> reuse residual\n"
    rows = list[dict[str, str]]()
    for declared, read in (("", norm), (f"signal d = {norm}\n", "d")):
        toy = models.Toy(blocks=3)
        model, policy = toy.build(), cachepolicy.parse(rule.format(declared, read, limit))
        with cachepolicy.apply(model, policy) as run, torch.no_grad():
            hidden, conditioning = models.inputs(toy)
            for step, t in enumerate(TIMESTEPS):
                model(hidden * (1 + 0.1 * step), torch.tensor([t]), conditioning)
            rows.append(run.trace.rows())
    assert rows[0] == rows[1]
    assert limit < 1e6 or "R" in rows[0].popitem()[1]
