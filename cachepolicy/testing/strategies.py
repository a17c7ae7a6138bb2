"""Hypothesis strategies for clocks, guidance branches and policies that engine and simulator can run.

Policies are drawn as text and then parsed, so a failing example is printed as a policy that can be saved and run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from cachepolicy.language import ir
from cachepolicy.language.parser import parse

TextStrategy = st.SearchStrategy[str]

SELECTORS = (
    "attention", "self_attention", "cross_attention", "feedforward", "block", "model", "each blocks[0:1]",
    '"attn"', r'"\.0\.(attn|ff)"', '"ff$"', '"blocks.*(attn|ff)"', '"^stages.0$"', "attention or feedforward",
    'attention and not "0"', 'block and "1$"', '"to_q$"', "feedforward within each blocks[::2]", '"q" within attention',
)  # fmt: skip
"""Selectors that match in most of the toys of `testing.models`, and only modules that return what they are given."""

EVERYWHERE = ("attention", "self_attention", "feedforward", "block", "model", '"attn"', '"ff$"')
"""Selectors that match in all toys. `policies` draws the first rule from them: a policy without a match is an error."""

ACTIONS = ("reuse", "reuse", "reuse residual", "skip", "compute")


def timesteps(least: int = 1, most: int = 12) -> st.SearchStrategy[list[float]]:
    """Draw the clock of one trajectory.

    Args:
        least: The smallest number of steps.
        most: The largest number of steps.

    Returns:
        A strategy of lists of distinct decreasing timesteps in training units, 0 to 1000. The first is no fraction of
        1, which a model of an unknown class is not called with at the start.
    """
    numbers = st.integers(0, 1000).map(float) | st.floats(0, 1000, width=32)
    drawn = st.lists(numbers, min_size=least, max_size=most, unique=True)
    return drawn.map(lambda values: sorted(values, reverse=True)).filter(lambda values: not 0 < values[0] < 1)


def branches() -> st.SearchStrategy[tuple[str, ...]]:
    """Draw the guidance branches of a run: one unnamed branch, or `cond` and `uncond` in either order."""
    return st.sampled_from([("",), ("cond", "uncond"), ("uncond", "cond")])


# --- clauses ---------------------------------------------------------------------------------------------

_count = st.integers(1, 6)
_step = st.integers(0, 11)
_number = st.integers(0, 1000)
_set = st.lists(_step, min_size=1, max_size=4).map(lambda steps: "{" + ", ".join(map(str, steps)) + "}")
_order = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
_interval = st.tuples(st.sampled_from("(["), _number, st.integers(1, 900), st.sampled_from(")]")).map(
    lambda parts: f"{parts[0]}{parts[1]}, {parts[1] + parts[2]}{parts[3]}"
)


def _when() -> TextStrategy:
    simple = st.one_of(
        _interval.map(lambda interval: f"t in {interval}"),
        st.builds("{} < t <= {}".format, _number, _number),
        _set.map(lambda steps: f"step in {steps}"),
        st.builds("step {} {}".format, _order, _step),
        st.builds("step % {} == {}".format, _count, _step),
        st.builds("progress {} {}".format, _order, st.sampled_from(["0.25", "0.5", "1"])),
        st.builds("age {} {}".format, _order, _count),
        st.builds("gap {} {}".format, _order, _count),
        st.builds("computes {} {}".format, _order, _count),
        st.builds("steps - step > {}".format, _count),
        st.builds("t / (step - {}) > {}".format, _step, _number),
        st.sampled_from(["cond", "uncond"]).map(lambda name: f'branch == "{name}"'),
    )
    return st.recursive(
        simple,
        lambda inner: st.one_of(
            inner.map(lambda clause: f"not ({clause})"),
            st.builds("({}) and ({})".format, inner, inner),
            st.builds("({}) or ({})".format, inner, inner),
        ),
        max_leaves=3,
    )


def _schedule(steps: int) -> TextStrategy:
    return st.one_of(
        _count.map(lambda interval: f"every {interval}"),
        st.builds("every {} offset {}".format, _count, _step),
        _count.map(lambda interval: f"every {interval} from end"),
        _count.map(lambda interval: f"every {interval} since compute"),
        _count.map(lambda interval: f"every step - {interval}"),
        _count.map(lambda more: f"every floor(computes / 2) + {more} since compute"),
        _count.map(lambda more: f"every gap + {more}"),
        st.builds("every 1 + step / {} offset step / {}".format, _count, _count),
        _count.map(lambda interval: f"every {interval} * progress since compute"),
        _set.map(lambda at: f"on {at}"),
        st.text("01", min_size=steps, max_size=steps).map(lambda mask: f'mask "{mask}"'),
    )


def _while() -> TextStrategy:
    simple = st.one_of(
        _count.map(lambda most: f"sum(1) <= {most}"),
        _number.map(lambda most: f"sum(t) < {most * 4}"),
        _number.map(lambda most: f"sum(abs(t - prev(t))) < {most}"),
        _count.map(lambda most: f"product(1.5) < {most}"),
        st.builds("sum(product(2)) {} {}".format, _order, st.integers(1, 30)),
        _number.map(lambda most: f"abs(t - kept(t)) < {most}"),
        _number.map(lambda most: f"sum(t, decay: 0.5) < {most}"),
        _number.map(lambda most: f"total(abs(t - kept(t))) < {most}"),
        st.builds("ema(t - prev(t), 0.25) {} -{}".format, _order, _number),
        st.builds("latch(t < {}) or latch(kept(step) >= {})".format, _number, _step),
        st.builds("not latch(sum(1) > {})".format, _count),
        st.builds("at_step({}, t) - t {} {}".format, _step, _order, _number),
        st.builds("at_step({}, kept(t)) {} {}".format, _step, _order, _number),
        st.builds("step - kept(step, 2) {} {}".format, _order, _count),
        st.builds("gap {} {}".format, _order, _count),
        st.builds("kept(age) {} {}".format, _order, _count),
        st.builds("prev(t) - t {} {}".format, _order, _number),
        st.builds("prev(prev(step)) {} {}".format, _order, _step),
        st.builds("step {} {}".format, _order, _step),
    )
    return st.recursive(
        simple,
        lambda inner: inner.map(lambda clause: f"not ({clause})") | st.builds("{} and {}".format, simple, inner),
        max_leaves=2,
    )


_drift = st.sampled_from([
    "l1(x, prev(x))", "relative_l1(x, kept(x))", "l2(prev(y), kept(y))", "kept(step) / (1 + l1(prev(y)))",
    "1 - cosine(x, kept(x, 2))", "l1(x - prev(x))", "l2(2 * prev(y) - kept(y), x)", "1 - cosine(cross(cond, x), x)",
    "relative_l1(cross(cond, prev(y)), cross(uncond, prev(y)))", "cross(cond, l1(x, prev(x)))", "l1(x) / gap",
    "differing(x, kept(x))",
])  # fmt: skip
_SIGNAL_NAMES = ("drift", "change", "rate")
_combined = st.sampled_from(["{0} + prev({0})", "abs({0} - kept({0}))", "max({0}, {1})", "{0} * {1}"])


@st.composite
def signals(draw: st.DrawFn) -> list[str]:
    """Draw declarations of the signals `drift`, `change` and `rate`, which read one another, in any order.

    Args:
        draw: Given by hypothesis.

    Returns:
        The lines of the declarations.
    """
    lines = ["signal x = input(model)", "signal y = output(model)"]
    for number, name in enumerate(_SIGNAL_NAMES):
        if number and draw(st.booleans()):
            known = st.sampled_from(_SIGNAL_NAMES[:number])
            lines.append(f"signal {name} = {draw(_combined).format(draw(known), draw(known))}")
        else:
            lines.append(f"signal {name} = {draw(_drift)}")
    return draw(st.permutations(lines))


def _measured() -> TextStrategy:
    """Conditions on the signals of `signals`, and on norms of them."""
    limit = st.sampled_from(["0.01", "0.1", "0.5", "2", "100"])
    read = (st.sampled_from(_SIGNAL_NAMES) | _drift).flatmap(lambda name: st.sampled_from([name, f"sum({name})"]))
    return st.builds("{} <= {}".format, read, limit)


EXTERNAL = "load"
"""The external that drawn `while` clauses read."""


def _of_the_caller() -> TextStrategy:
    """Conditions on the external `load`."""
    limit = st.sampled_from(["0", "0.5", "2"])
    read = st.sampled_from(["{0}", "sum({0})", "prev({0})", "kept({0})", "ema({0}, 0.5)", "{0} * age", "step - {0}"])
    return st.builds("{} {} {}".format, read.map(lambda form: form.format(EXTERNAL)), _order, limit)


_bounds = st.sampled_from([
    "", "", "at most {} in a row", "at most {} in all", "at most {} in all at most {} in a row",
    "at most (step + {}) / 2 in all", "at most 1 + progress * {} in a row",
])  # fmt: skip


@st.composite
def rules(
    draw: st.DrawFn,
    *,
    steps: int = 12,
    selectors: Sequence[str] = SELECTORS,
    actions: Sequence[str] = ACTIONS,
    stateful: bool = True,
    follow: str | None = None,
    measured: bool = False,
    guided: bool = False,
    external: bool = False,
) -> str:
    """Draw the text of one rule, with `match optional`.

    Args:
        draw: Given by hypothesis.
        steps: The number of steps of the run; masks have this length.
        selectors: The selectors to draw from.
        actions: The actions to draw from.
        stateful: If True, the rule may have a `while` clause.
        follow: The branch that the rule may follow; None draws no `follow`.
        measured: If True, the `while` clause may read the signals of `signals`.
        guided: If True, the `when` clause may read `uncond_skipped`.
        external: If True, the `while` clause may read the external `EXTERNAL`.

    Returns:
        One line of a policy.
    """
    selector = draw(st.sampled_from(list(selectors)))
    parts = ["match optional", selector]
    if draw(st.booleans()):
        skipped = st.sampled_from(["uncond_skipped", "not uncond_skipped"])
        # Whether the unconditional half is skipped follows from the rules on the model, which cannot read it.
        parts.append(f"when {draw(skipped | _when() if guided and selector != 'model' else _when())}")
    if draw(st.booleans()):
        parts.append(draw(_schedule(steps)))
    if stateful and draw(st.booleans()):
        clauses = _measured() | _while() if measured else _while()
        parts.append(f"while {draw(_of_the_caller() | clauses if external else clauses)}")
    parts.append(draw(_bounds).format(draw(_count), draw(_count)))
    action = draw(st.sampled_from(list(actions)))
    parts.append(f"-> {action}")
    if follow is not None and draw(st.booleans()):
        parts.append(f"follow {follow}")
    return " ".join(part for part in parts if part)


APPROXIMATION = 'approximate uncond spectral(low: 1.1, high: 1, format: "BSC", grid: [1, 2, 2], layout: "uncond first")'
"""Rebuilds the unconditional half of the predictions of the toys in `cachepolicy.testing.models`."""


@st.composite
def policies(  # noqa: PLR0913 (all that a policy may draw)
    draw: st.DrawFn,
    *,
    steps: int = 12,
    least: int = 1,
    most: int = 4,
    selectors: Sequence[str] = SELECTORS,
    actions: Sequence[str] = ACTIONS,
    stateful: bool = True,
    follow: str | None = None,
    measured: bool = False,
    approximate: str | None = None,
    external: bool = False,
) -> ir.Policy:
    """Draw a policy. All rules are optional, so the policy can be bound to any model that the first rule matches.

    Args:
        draw: Given by hypothesis.
        steps: The number of steps of the run.
        least: The smallest number of rules.
        most: The largest number of rules.
        selectors: The selectors to draw from; the first rule takes one of `EVERYWHERE` if any of them is there.
        actions: The actions to draw from.
        stateful: If True, rules may have `while` clauses.
        follow: The branch that rules may follow; None draws no `follow`.
        measured: If True, rules may read signals. The policy declares the signals above or below its rules.
        approximate: An `approximate uncond` action that one rule for the model takes; None draws no such rule.
        external: If True, rules may read the external `EXTERNAL`, which the policy declares.

    Returns:
        The parsed policy.
    """
    options: dict[str, Any] = {
        "steps": steps, "actions": actions, "stateful": stateful, "follow": follow, "measured": measured,
        "guided": approximate is not None, "external": external,
    }  # fmt: skip
    first = draw(
        rules(selectors=[selector for selector in selectors if selector in EVERYWHERE] or selectors, **options)
    )
    others = draw(st.lists(rules(selectors=selectors, **options), min_size=least - 1, max_size=most - 1))
    lines = [first, *others]
    if approximate is not None:
        options |= {"actions": [approximate], "follow": None}
        lines.insert(draw(st.integers(0, len(lines))), draw(rules(selectors=["model"], **options)))
    declared = draw(signals()) if measured else []
    declared += [f"external {EXTERNAL}: float"] if external else []
    lines = [*declared, *lines] if draw(st.booleans()) else [*lines, *declared]
    return parse("\n".join(["policy drawn", *lines, ""]))
