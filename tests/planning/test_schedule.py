"""The decision function against a second one, and what holds of every schedule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cachepolicy.language import ir
from cachepolicy.language.formatter import format
from cachepolicy.language.parser import parse
from cachepolicy.planning.plan import Plan
from cachepolicy.planning.schedule import FRESH, Decision, Inputs, Tick, decide, decide_all, prepare
from cachepolicy.planning.simulation import Schedule, plan, simulate
from cachepolicy.testing import checks, strategies
from tests.support import reference_schedule

SELECTORS = (*strategies.SELECTORS, "blocks", "blocks[1:3]", "blocks[1:]")
ACTIONS = (*strategies.ACTIONS, "predict linear(weight: 1 / (3 - gap))")


@st.composite
def drawn(draw: st.DrawFn, **options: object) -> Schedule:
    """A schedule of any policy on any clock, on the built-in model."""
    timesteps, branches = draw(strategies.timesteps()), draw(strategies.branches())
    follow = "cond" if len(branches) > 1 else None
    policy = draw(
        strategies.policies(steps=len(timesteps), selectors=SELECTORS, actions=ACTIONS, follow=follow, **options)
    )
    return simulate(policy, steps=len(timesteps), timesteps=timesteps, branches=branches)


def rows(text: str, steps: int = 10, site: str = "transformer_blocks.0.attn1", **options: object) -> str:
    return simulate(parse(text), steps=steps, **options).rows[site]


@given(drawn())
def test_equals_a_second_implementation(schedule: Schedule) -> None:
    """A naive schedule, written from the description alone, gives the same letters for every site, step and branch."""
    expected = reference_schedule.rows(
        [(bound.rule, bound.sites) for bound in schedule.plan.rules],
        [site.parents for site in schedule.plan.sites],
        [tick.t for tick in schedule.ticks if tick.branch == schedule.branches[0]],
        schedule.branches,
    )
    got = {branch: list(schedule.rows_of(branch).values()) for branch in schedule.branches}
    assert expected == got, format(schedule.plan.policy)


@pytest.mark.deep
@given(drawn(most=8))
def test_equals_a_second_implementation_for_long_policies(schedule: Schedule) -> None:
    """The same for policies of up to eight rules."""
    test_equals_a_second_implementation.hypothesis.inner_test(schedule)


@given(drawn())
def test_is_well_formed(schedule: Schedule) -> None:
    """Whatever the policy: no reuse before a compute, computes on ticks, first match, nesting and bounds hold."""
    checks.well_formed(schedule)


@given(drawn())
def test_a_site_without_an_owner_computes(schedule: Schedule) -> None:
    """Where no rule's `when` holds the site computes, unless it is hidden."""
    for _, decisions in schedule:
        assert all(each.verdict in ("compute", "hidden") for each in decisions if each.rule is None)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 9))
def test_every_computes_exactly_on_its_ticks(interval: int, steps: int, offset: int) -> None:
    """`every N`, with an offset, from the end and since the last compute, by their definitions."""
    start, end, shifted = ["C" if step == 0 or step % interval == 0 else "R" for step in range(steps)], [], []
    for step in range(steps):
        end.append("C" if step == 0 or (steps - 1 - step) % interval == 0 else "R")
        shifted.append("C" if step == 0 or (step - offset) % interval == 0 else "R")
    assert "".join(start) == rows(f"match attention every {interval} -> reuse", steps)
    assert "".join(start) == rows(f"match attention every {interval} since compute -> reuse", steps)
    assert "".join(end) == rows(f"match attention every {interval} from end -> reuse", steps)
    assert "".join(shifted) == rows(f"match attention every {interval} offset {offset} -> reuse", steps)


@given(st.sets(st.integers(0, 19), min_size=1), st.integers(1, 20))
def test_on_and_mask_compute_exactly_where_they_say(at: set[int], steps: int) -> None:
    """`on {..}` and the mask that says the same give the same row."""
    row = "".join("C" if step in at or step == 0 else "R" for step in range(steps))
    mask = "".join("1" if step in at else "0" for step in range(steps))
    assert row == rows(f"match attention on {{{', '.join(map(str, sorted(at)))}}} -> reuse", steps)
    assert row == rows(f'match attention mask "{mask}" -> reuse', steps)


@given(st.integers(1, 6), st.integers(2, 25), strategies.timesteps(2, 12))
def test_staleness_is_bounded(most: int, steps: int, timesteps: list[float]) -> None:
    """`at most N in a row` and `every N since compute` bound the age of every answer, whatever else decides."""
    checks.staleness_bounded(
        simulate(parse(f"match attention when t < 900 at most {most} in a row -> reuse"), steps=steps), most
    )
    checks.staleness_bounded(
        simulate(
            parse(f"match attention when step != 3 every {most + 1} since compute -> reuse"),
            steps=len(timesteps),
            timesteps=timesteps,
        ),
        most,
    )


def test_windows_never_shift_the_phase() -> None:
    """Steps are absolute: where `when` begins does not move the ticks of `every`."""
    assert "CCCRCRCRCC" == rows("match attention when 100 < t < 800 every 2 -> reuse")
    assert "CCRRCRRCRR" == rows("match attention when step >= 2 every 3 offset 1 -> reuse")


def test_first_match_wins() -> None:
    """A rule above carves out exceptions from a rule below, and the other way round does nothing."""
    exception, broad = "match attention when step in {3, 4} -> compute\n", "match attention every 5 -> reuse\n"
    assert "CRRCCCRRRR" == rows(exception + broad)
    assert "CRRRRCRRRR" == rows(broad + exception)


def test_no_later_rule_is_asked() -> None:
    """An owner whose schedule says compute computes, though a later rule would reuse."""
    assert "CRCRCRCRCR" == rows("match attention every 2 -> reuse\nmatch attention -> reuse")


def test_reuse_hides_what_is_inside_in_any_order_of_rules() -> None:
    """Sites inside a site that reuses are hidden, whichever rule stands first; computing forces only itself."""
    outer, inner = "match block every 2 -> reuse\n", "match attention -> compute\n"
    for text in (outer + inner, inner + outer):
        schedule = simulate(parse(text), steps=4)
        assert "CRCR" == schedule.rows["transformer_blocks.0"]
        assert "C.C." == schedule.rows["transformer_blocks.0.attn1"]


def test_hidden_sites_age() -> None:
    """A hidden step counts for the age of the site that it hides."""
    text = "match block when step in {1, 2} -> reuse\nmatch attention every 4 since compute -> reuse"
    schedule = simulate(parse(text), steps=6)
    assert "CRRCCC" == schedule.rows["transformer_blocks.0"]
    assert "C..RCR" == schedule.rows["transformer_blocks.0.attn1"]


def test_skip_needs_no_history() -> None:
    """`skip` may answer before anything was computed, `reuse` may not."""
    assert "RRR" == rows("match attention -> skip", 3)
    assert "CRR" == rows("match attention -> reuse", 3)


def test_bounds_count_per_rule() -> None:
    """`in all` counts this rule's reuses, `in a row` the age, whoever answered."""
    assert "CRRCCCCC" == rows("match attention at most 2 in all -> reuse", 8)
    assert "CRRCRRCR" == rows("match attention at most 2 in a row -> reuse", 8)
    two = "match attention when step < 4 at most 2 in all -> reuse\nmatch attention at most 2 in all -> reuse"
    assert "CRRCRRCC" == rows(two, 8)


def test_an_undefined_number_makes_the_clause_false() -> None:
    """`prev` at the first step, and its negation, both compute; `when` with a division by zero does not own."""
    assert "CRRR" == rows("match attention while prev(step) >= 0 -> reuse", 4)
    assert "CCCC" == rows("match attention while not prev(step) >= 0 -> reuse", 4)
    assert "CRCR" == rows("match attention when 1 / (step - 2) < 9 -> reuse", 4)


def test_accumulators_start_anew_at_each_compute() -> None:
    """`sum` runs over the steps since the site last computed, this one included."""
    assert "CRRCRRCR" == rows("match attention while sum(1) < 3 -> reuse", 8)
    assert "CRRCRRCR" == rows("match attention while product(2) < 8 -> reuse", 8)


def test_memories_look_back_to_computes() -> None:
    """`kept(x)` is x at the last compute for whatever reason, `kept(x, 2)` at the one before."""
    assert "CRRCRRCR" == rows("match attention while step - kept(step) < 3 -> reuse", 8)
    assert "CCRRRCCR" == rows("match attention while step - kept(step, 2) < 5 -> reuse", 8)


BRANCHES = ("cond", "uncond")


def test_follow_repeats_what_the_leader_did() -> None:
    """On another branch a following rule reuses exactly where it reused on the leader in the same step."""
    text = "match attention while sum(1) < 3 -> reuse follow cond"
    schedule = simulate(parse(text), steps=7, branches=BRANCHES)
    assert schedule.rows_of("cond") == schedule.rows_of("uncond")


def test_a_leader_that_runs_later_is_not_followed() -> None:
    """Where the leader has not run in the step yet, the follower computes."""
    text = "match attention -> reuse follow cond"
    schedule = simulate(parse(text), steps=4, branches=("uncond", "cond"))
    site = "transformer_blocks.0.attn1"
    assert ("CCCC", "CRRR") == (schedule.rows_of("uncond")[site], schedule.rows_of("cond")[site])


def test_a_run_without_branches_follows_nobody() -> None:
    """A rule that follows a branch decides by itself where the calls of a run are not told apart."""
    text = "match attention every 3 -> reuse{}"
    expected = simulate(parse(text.format("")), steps=7).rows
    assert expected == simulate(parse(text.format(" follow cond")), steps=7).rows


def test_branches_do_not_share_a_past() -> None:
    """What one branch computes counts for no other."""
    text = 'match attention when branch == "cond" or step > 1 at most 1 in all -> reuse'
    schedule = simulate(parse(text), steps=4, branches=BRANCHES)
    site = "transformer_blocks.0.attn1"
    assert ("CRCC", "CCRC") == (schedule.rows_of("cond")[site], schedule.rows_of("uncond")[site])


@given(drawn())
def test_coarse_and_fine_partitions_agree(schedule: Schedule) -> None:
    """Deciding once for all sites with equal rules and surroundings is deciding for each."""
    program = prepare(schedule.plan)
    for partition in (program.coarse, program.fine):
        memories, leaders = dict[str, list](), dict[tuple[str, int], Sequence[Decision]]()
        for tick in schedule.ticks:
            cond = leaders.get(("cond", tick.step))
            leader = {} if cond is None else {"cond": cond}
            before = memories.get(tick.branch, partition.start())
            decisions, memories[tick.branch] = decide_all(program, partition, before, tick, followed=leader)
            leaders[tick.branch, tick.step] = spread = partition.spread(decisions)
            assert [each.letter for each in schedule.decisions[tick.branch, tick.step]] == [
                each.letter for each in spread
            ]


@given(drawn(), st.data())
def test_a_split_partition_goes_on_as_the_coarse_one_would(schedule: Schedule, data: st.DataObject) -> None:
    """After the split the memories are those of the group that a site was in."""
    assume(len(schedule.branches) == 1)
    program, at = prepare(schedule.plan), data.draw(st.integers(0, schedule.steps))
    partition, memories = program.coarse, program.coarse.start()
    for tick in schedule.ticks:
        if tick.step == at:
            partition, memories = program.fine, program.split(memories)
        decisions, memories = decide_all(program, partition, memories, tick)
        assert [each.letter for each in schedule.decisions["", tick.step]] == [
            each.letter for each in partition.spread(decisions)
        ]


def test_equal_sites_share_one_decision() -> None:
    """The cost of deciding does not grow with the depth of the model."""
    partition = prepare(plan(parse("match attention every 2 -> reuse"))).coarse
    assert 1 == len(partition.groups)
    assert len(partition.group_of) > 10


def test_a_fact_turns_a_reuse_into_a_compute_and_nothing_else() -> None:
    """What only the run knows is the reason of the compute, and asks of a compute nothing."""
    bound = plan(parse("match attention every 2 -> reuse")).rules
    kept = simulate(parse("match attention every 2 -> reuse"), steps=2).decision("transformer_blocks.0.attn1", 1).inputs
    assert kept is not None
    reused = decide(bound, kept)
    forced = decide(bound, Inputs(kept.tick, kept.memory, {}, {}, fact="memory is short"))
    assert ("reuse", "compute", "memory is short") == (reused.verdict, forced.verdict, forced.reason)
    computed = decide(bound, Inputs(Tick(0), FRESH, {}, {}, fact="memory is short"))
    assert "its schedule says so" == computed.reason


_number = st.none() | st.floats() | st.integers(-10, 10**6)


@given(
    strategies.policies(follow="cond"),
    st.builds(
        Tick,
        step=st.integers(0, 10**6),
        t=_number,
        steps=st.none() | st.integers(1, 10**6),
        sigma=_number,
        branch=st.sampled_from(["", "cond", "1"]),
        uncond_skipped=st.booleans(),
    ),
)
def test_is_total(policy: ir.Policy, tick: Tick) -> None:
    """Any clock, NaN and unknown numbers included, gives a decision with a reason, and never an exception."""
    bound: Plan = plan(policy)
    decision = decide(bound.rules, Inputs(tick, FRESH, {}, {}))
    assert decision.verdict in ("compute", "reuse")
    assert decision.reason


@given(drawn())
def test_is_deterministic(schedule: Schedule) -> None:
    """The same question has the same answer: nothing is remembered between schedules."""
    again = simulate(
        schedule.plan,
        steps=schedule.steps,
        timesteps=[tick.t for tick in schedule.ticks if tick.branch == schedule.branches[0]],
        branches=schedule.branches,
    )
    assert [schedule.rows_of(branch) for branch in schedule.branches] == [
        again.rows_of(branch) for branch in again.branches
    ]
