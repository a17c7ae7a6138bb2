"""Hypothesis strategies for policies: `shapes` of any that a text can say, `policies` that make sense too."""

from __future__ import annotations

import string

from hypothesis import strategies as st

from cachepolicy.language import ir
from cachepolicy.language.source import is_writable
from cachepolicy.language.vocabulary import CLOCK, FUNCTIONS, KINDS, PROBES, RESERVED, TYPES

names = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=6).filter(
    lambda name: not name[0].isdigit() and name not in RESERVED
)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=8).filter(
    is_writable
) | st.sampled_from(['"', "'", "\"'", "", "a # b", "->", r"^blocks\.0\.norm1$"])
amounts = (
    st.integers(-20, 1000)
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.sampled_from([0.5, 1e-7, 1e22])
)
finite = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)

leaves = st.one_of(
    st.builds(ir.Number, value=amounts),
    st.builds(ir.Boolean, value=st.booleans()),
    st.builds(ir.Text, value=texts),
    st.just(ir.Off()),
    st.builds(ir.Name, name=names | st.sampled_from(sorted(CLOCK))),
)


_positions = st.builds(ir.Number, value=st.integers(-9, 99)) | st.builds(ir.Name, name=names)
tokens = (
    st.none()
    | st.just(ir.Tokens(latent=True))
    | st.builds(ir.Tokens, start=st.none() | _positions, stop=st.none() | _positions)
)


def tuples(items: st.SearchStrategy, least: int = 1, most: int = 3) -> st.SearchStrategy:
    return st.lists(items, min_size=least, max_size=most).map(tuple)


def intervals(ends: st.SearchStrategy) -> st.SearchStrategy[ir.Interval]:
    return st.builds(ir.Interval, low=ends, high=ends, low_closed=st.booleans(), high_closed=st.booleans())


def _chained(operators: st.SearchStrategy[list[str]], operands: st.SearchStrategy) -> st.SearchStrategy[ir.Comparison]:
    """Comparisons with the drawn operators, one operand more than these."""
    return operators.flatmap(
        lambda found: st.builds(
            ir.Comparison,
            operators=st.just(tuple(found)),
            operands=tuples(operands, len(found) + 1, len(found) + 1),
        )
    )


functions = st.sampled_from(sorted(FUNCTIONS.keys() - {"cross"}))


def labelled(inner: st.SearchStrategy) -> st.SearchStrategy:
    return tuples(st.builds(ir.Argument, label=names, value=inner), 0, 2)


def _comparisons(operands: st.SearchStrategy) -> st.SearchStrategy[ir.Comparison]:
    operators = st.lists(st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), min_size=1, max_size=3)
    return _chained(operators, operands)


def _compounds(inner: st.SearchStrategy) -> st.SearchStrategy:
    containers = intervals(inner) | st.builds(ir.SetOf, items=tuples(inner)) | st.builds(ir.Name, name=names)
    return st.one_of(
        st.builds(ir.Negative, operand=inner),
        st.builds(ir.Arithmetic, operator=st.sampled_from("+-*/%"), left=inner, right=inner),
        _comparisons(inner),
        st.builds(ir.Both, operands=tuples(inner, 2)),
        st.builds(ir.Either, operands=tuples(inner, 2)),
        st.builds(ir.Negation, operand=inner),
        st.builds(ir.Conditional, then=inner, condition=inner, otherwise=inner),
        st.builds(ir.Membership, value=inner, container=containers),
        st.builds(ir.Call, function=names | functions, arguments=tuples(inner, 0)),
        st.builds(ir.Call, function=names | functions, arguments=tuples(inner), labelled=labelled(inner)),
        st.builds(
            ir.Call, function=st.just("cross"), arguments=st.tuples(st.builds(ir.Text, value=names | texts), inner)
        ),
        st.builds(ir.Over, function=names | functions, value=inner, selector=selectors),
        st.builds(ir.Lookup, table=names, index=inner),
        st.builds(ir.ListOf, items=tuples(inner, 0)),
        st.builds(
            ir.Probe, stream=st.sampled_from(PROBES), selector=selectors, argument=st.none() | texts, tokens=tokens
        ),
    )


def _joined(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(
        st.builds(ir.AllOf, selectors=tuples(inner, 2)),
        st.builds(ir.AnyOf, selectors=tuples(inner, 2)),
        st.builds(ir.NoneOf, selector=inner),
        st.builds(ir.Within, selector=inner, inside=inner),
    )


blocks = st.one_of(
    st.builds(ir.Blocks, each=st.booleans(), index=_positions, of=st.none() | texts),
    st.builds(
        ir.Blocks,
        each=st.booleans(),
        start=st.none() | _positions,
        stop=st.none() | _positions,
        stride=st.none() | _positions,
        of=st.none() | texts,
    ),
)
selectors = st.recursive(
    st.one_of(
        st.builds(ir.Pattern, regex=texts),
        st.builds(ir.PatternParam, name=names),
        st.builds(ir.OfKind, of=st.sampled_from(KINDS)),
        st.builds(ir.OfClass, regex=texts),
        blocks,
    ),
    _joined,
    max_leaves=4,
)
expressions = st.recursive(leaves, _compounds, max_leaves=6)

schedules = st.one_of(
    st.builds(ir.Every, interval=expressions, offset=st.none() | expressions),
    st.builds(ir.Every, interval=expressions, anchor=st.sampled_from(["end", "compute"])),
    st.builds(ir.OnSteps, steps=st.builds(ir.SetOf, items=tuples(expressions)) | st.builds(ir.Name, name=names)),
    st.builds(ir.Mask, mask=st.builds(ir.Text, value=texts) | st.builds(ir.Name, name=names)),
    st.builds(ir.Mask, mask=st.builds(ir.Name, name=names), by_site=st.just(True)),
)
bounds = st.builds(ir.Bound, count=expressions, scope=st.sampled_from(["row", "all"]))
_arguments = tuples(st.builds(ir.Argument, label=names, value=expressions), 0)
actions = st.one_of(
    st.just(ir.Compute()),
    st.just(ir.Skip()),
    st.builds(ir.Reuse, residual=st.booleans()),
    st.builds(ir.Predict, predictor=names, arguments=_arguments, residual=st.booleans()),
    st.builds(ir.ApproximateUncond, method=names, arguments=_arguments),
)

_open = intervals(expressions).filter(lambda each: not (each.low_closed and each.high_closed))
_settings = tuples(st.builds(ir.Setting, name=names, value=expressions | _open), 0)
statements = st.one_of(
    st.builds(
        ir.Param,
        name=names,
        type=st.sampled_from([each for each in TYPES if each != "range"]),
        optional=st.booleans(),
        default=st.none() | expressions | _open,
        domain=st.none() | intervals(expressions) | st.builds(ir.SetOf, items=tuples(expressions)),
        doc=st.none() | texts,
    ),
    st.builds(ir.Param, name=names, type=st.just("range"), default=intervals(expressions)),
    st.builds(ir.Let, name=names, value=expressions),
    st.builds(ir.Table, name=names, values=tuples(finite)),
    st.builds(ir.Signal, name=names, value=expressions),
    st.builds(ir.External, name=names),
    st.builds(
        ir.Rule,
        selector=selectors,
        optional=st.booleans(),
        when=st.none() | expressions,
        schedule=st.none() | schedules,
        condition=st.none() | expressions,
        bounds=tuples(bounds, 0, 2),
        action=actions,
        follow=st.none() | names,
    ),
    st.builds(
        ir.Use,
        policy=names | texts,
        settings=_settings,
        when=st.none() | expressions,
        bound=st.none() | st.builds(ir.Bound, count=expressions, scope=st.just("row")),
    ),
    st.builds(
        ir.Preset,
        name=names,
        for_class=texts,
        when=st.none() | expressions,
        settings=_settings.filter(bool),
        origin=st.none() | texts,
    ),
    st.builds(
        ir.Expect,
        selector=selectors,
        steps=st.integers(0, 99),
        settings=_settings,
        row=st.text("CR", min_size=1, max_size=60),
    ),
    st.builds(ir.Tuned, steps=st.integers(0, 99), settings=_settings),
)
comments = (
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp", "Zs"]), max_size=8)
    .filter(is_writable)
    .map(lambda text: f"# {text}".rstrip())
)


@st.composite
def shapes(draw: st.DrawFn) -> ir.Policy:
    """Any policy that a text can say, with comments; its names and types may be nonsense."""
    body = draw(tuples(statements, 0, 4))
    name, source = draw(st.none() | names), draw(st.none() | texts)
    places = [-3, *([-2] if name is not None else []), *([-1] if source is not None else []), *range(len(body))]
    notes = list[ir.Comment]()
    for place in [*places, len(body)]:
        notes += [
            ir.Comment(statement=place, place="before", text=text)
            for text in draw(st.lists(comments | st.just(""), max_size=2))
        ]
        if place < len(body) and draw(st.booleans()):
            notes.append(ir.Comment(statement=place, place="after", text=draw(comments)))
    title = draw(st.none() | texts) if name is not None else None
    return ir.Policy(name=name, title=title, source=source, statements=body, comments=tuple(notes))


# --- policies that make sense ----------------------------------------------------------------------------

_whole = st.integers(1, 9)
_clock = st.sampled_from(["t", "step", "steps", "progress", "age"]).map(lambda name: ir.Name(name=name))
numbers = st.recursive(
    st.builds(ir.Number, value=st.integers(-9, 999) | st.floats(-9, 999)) | _clock | st.just(ir.Name(name="threshold")),
    lambda inner: st.one_of(
        st.builds(ir.Negative, operand=inner),
        st.builds(ir.Arithmetic, operator=st.sampled_from("+-*/%"), left=inner, right=inner),
        st.builds(ir.Call, function=st.just("abs"), arguments=tuples(inner, 1, 1)),
        st.builds(ir.Call, function=st.sampled_from(["min", "max"]), arguments=tuples(inner, 2)),
        st.builds(ir.Lookup, table=st.just("ratios"), index=st.just(ir.Name(name="step"))),
        st.builds(ir.Conditional, then=inner, condition=st.just(ir.Name(name="late")), otherwise=inner),
    ),
    max_leaves=4,
)


def _chains(operands: st.SearchStrategy) -> st.SearchStrategy[ir.Comparison]:
    ways = st.sampled_from([("<", "<="), (">", ">=")])
    operators = ways.flatmap(lambda way: st.lists(st.sampled_from(way), min_size=1, max_size=2))
    return _chained(operators, operands)


def conditions(operands: st.SearchStrategy) -> st.SearchStrategy:
    """Boolean expressions over the given numbers."""
    steps = st.builds(ir.SetOf, items=tuples(st.builds(ir.Number, value=st.integers(0, 30))))
    windows = st.sampled_from(
        [ir.Name(name="window"), ir.Interval(low=ir.Number(value=100), high=ir.Number(value=800))]
    )
    return st.recursive(
        _chains(operands)
        | st.builds(ir.Membership, value=operands, container=steps | windows)
        | st.just(ir.Name(name="late")),
        lambda inner: st.one_of(
            st.builds(ir.Both, operands=tuples(inner, 2)),
            st.builds(ir.Either, operands=tuples(inner, 2)),
            st.builds(ir.Negation, operand=inner),
        ),
        max_leaves=3,
    )


_drift = ir.Call(function="sum", arguments=(ir.Name(name="drift"),))
_counts = st.builds(ir.Number, value=_whole)
_sound_selectors = st.one_of(
    st.recursive(
        st.one_of(
            st.sampled_from(["attention", "self_attention", "cross_attention", "feedforward", "block"]).map(
                lambda kind: ir.OfKind(of=kind)
            ),
            st.sampled_from(["^transformer_blocks", "attn", r"\.0\."]).map(lambda regex: ir.Pattern(regex=regex)),
            st.just(ir.PatternParam(name="names")),
        ),
        _joined,
        max_leaves=3,
    ),
    st.builds(ir.Blocks, start=st.none() | _counts),
)
_sound_rules = st.builds(
    ir.Rule,
    selector=_sound_selectors,
    optional=st.booleans(),
    when=st.none() | conditions(numbers),
    schedule=st.one_of(
        st.none(),
        st.builds(ir.Every, interval=_counts | st.just(ir.Name(name="interval")), offset=st.none() | _counts),
        st.builds(ir.Every, interval=_counts, anchor=st.sampled_from(["end", "compute"])),
        st.builds(ir.OnSteps, steps=st.builds(ir.SetOf, items=tuples(_counts))),
        st.builds(ir.Mask, mask=st.builds(ir.Text, value=st.text("01", min_size=1, max_size=9))),
    ),
    condition=st.none() | conditions(numbers | st.just(_drift)),
    bounds=st.sampled_from([(), ("row",), ("all",), ("row", "all")]).flatmap(
        lambda scopes: st.tuples(*(st.builds(ir.Bound, count=_counts, scope=st.just(scope)) for scope in scopes))
    ),
    action=st.one_of(
        st.just(ir.Compute()),
        st.builds(ir.Reuse, residual=st.booleans()),
        st.builds(
            ir.Predict,
            predictor=st.just("linear"),
            arguments=st.tuples(st.builds(ir.Argument, label=st.just("weight"), value=numbers)),
            residual=st.booleans(),
        ),
    ),
    follow=st.none() | st.just("cond"),
)


@st.composite
def policies(draw: st.DrawFn) -> ir.Policy:
    """Policies that make sense: they parse without an error."""
    output = ir.Name(name="head")
    declared: tuple[ir.Statement, ...] = (
        ir.Param(name="interval", type="int", optional=True, default=draw(_counts | st.just(ir.Off()))),
        ir.Param(name="threshold", type="float", default=ir.Number(value=draw(st.floats(0, 1)))),
        ir.Param(name="window", type="range", default=ir.Interval(low=ir.Number(value=100), high=ir.Number(value=800))),
        ir.Param(name="names", type="list", default=ir.ListOf(items=(ir.Text(value="blocks"),))),
        ir.Let(name="late", value=draw(_chains(_clock))),
        ir.Table(name="ratios", values=draw(tuples(finite))),
        ir.Signal(name="head", value=ir.Probe(stream="residual", selector=ir.Blocks(index=ir.Number(value=0)))),
        ir.Signal(
            name="drift",
            value=ir.Call(function="relative_l1", arguments=(output, ir.Call(function="prev", arguments=(output,)))),
        ),
    )
    return ir.Policy(name=draw(st.none() | names), statements=(*declared, *draw(tuples(_sound_rules, 1, 3))))
