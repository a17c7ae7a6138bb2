"""Selectors on models: which sites a rule takes, what hides what, and what does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.errors import PolicyError
from cachepolicy.language import ir
from cachepolicy.language.linker import load, resolve
from cachepolicy.language.parser import parse, parse_selector
from cachepolicy.planning.bind import bind
from cachepolicy.planning.module_tree import Module, Skeleton, ancestors, builtin, sites_skeleton
from cachepolicy.planning.plan import Plan, label
from cachepolicy.planning.selectors import outermost, select
from cachepolicy.planning.simulation import simulate

BUILTIN = builtin()
BLOCKS = tuple(block for name in BUILTIN.block_lists for block in BUILTIN.elements[name])

LATTE = sites_skeleton(
    [
        f"{name}.{index}.{part}"
        for name in ("transformer_blocks", "temporal_transformer_blocks")
        for index in range(3)
        for part in ("attn1", "attn1.to_q", "attn2", "ff")
    ]
)


def bound(text: str, skeleton: Skeleton = BUILTIN, **settings: Any) -> Plan:
    return bind(resolve(parse(text), settings), skeleton)


def refused(text: str, skeleton: Skeleton = BUILTIN, **settings: Any) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        bound(text, skeleton, **settings)
    return caught.value


def codes(error: PolicyError) -> list[str]:
    return [each.code for each in error.diagnostics]


def taken(selector: str, skeleton: Skeleton = BUILTIN) -> list[str]:
    return [modules[0] for modules in select(parse_selector(selector), skeleton)]


# --- models and selectors at random ----------------------------------------------------------------------

KINDS: list[ir.Kind] = ["attention", "self_attention", "cross_attention", "feedforward", "block"]
CLASSES = ["Attention", "FeedForward", "Linear", "Block"]


@st.composite
def skeletons(draw: st.DrawFn) -> Skeleton:
    """Trees of modules with any kinds and classes."""
    modules = [Module("", "Model", frozenset({"model"}))]
    for number in range(draw(st.integers(1, 14))):
        parent = draw(st.sampled_from(modules)).name
        stem = draw(st.sampled_from(["attn", "ff", "blocks", "norm"]))
        name = f"{parent}.{stem}{number}" if parent else f"{stem}{number}"
        is_list = draw(st.booleans()) and draw(st.booleans())
        kinds = frozenset[ir.Kind]() if is_list else draw(st.frozensets(st.sampled_from(KINDS), max_size=2))
        modules.append(Module(name, draw(st.sampled_from(CLASSES)), kinds, is_list, not is_list))
    order = {module.name: index for index, module in enumerate(modules)}
    ordered = sorted(
        modules, key=lambda module: [order[each] for each in [*ancestors(module.name)][::-1]] + [order[module.name]]
    )
    return Skeleton("random", tuple(ordered))


leaves = (
    st.sampled_from(["attn", "ff", "blocks", "^blocks", "norm.$", r"\d", ".", "attn.*ff"]).map(
        lambda r: ir.Pattern(regex=r)
    )
    | st.sampled_from(KINDS).map(lambda kind: ir.OfKind(of=kind))
    | st.just(ir.OfKind(of="model"))
    | st.sampled_from(["Attention", "e", "^B"]).map(lambda r: ir.OfClass(regex=r))
)
selectors = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, min_size=2, max_size=3).map(lambda each: ir.AllOf(selectors=tuple(each)))
        | st.lists(inner, min_size=2, max_size=3).map(lambda each: ir.AnyOf(selectors=tuple(each)))
        | inner.map(lambda each: ir.NoneOf(selector=each))
    ),
    max_leaves=6,
)


def truth(selector: ir.Selector, module: Module) -> bool:
    """Whether a selector takes one module, said in the plainest way."""
    match selector:
        case ir.Pattern():
            return module.name != "" and re.search(selector.regex, module.name) is not None
        case ir.OfKind(of="model"):
            return module.name == ""
        case ir.OfKind():
            return module.name != "" and selector.of in module.kinds
        case ir.OfClass():
            return module.name != "" and re.search(selector.regex, module.class_name) is not None
        case ir.AllOf():
            return all(truth(each, module) for each in selector.selectors)
        case ir.AnyOf():
            return any(truth(each, module) for each in selector.selectors)
        case ir.NoneOf():
            return module.name != "" and not truth(selector.selector, module)
        case _:
            raise AssertionError(selector)


@given(selectors, skeletons())
def test_selectors_are_sets_of_callable_modules(selector: ir.Selector, skeleton: Skeleton) -> None:
    """The sites are the outermost modules of those that satisfy the selector one by one."""
    members = {module.name for module in skeleton.modules if module.selectable and truth(selector, module)}
    expected = [name for name in skeleton.position if name in members and not members.intersection(ancestors(name))]
    assert expected == [name for (name,) in select(selector, skeleton)]


@given(selectors, skeletons())
def test_no_site_stands_in_another_of_its_rule(selector: ir.Selector, skeleton: Skeleton) -> None:
    """Outermost only, and in model order."""
    names = [name for (name,) in select(selector, skeleton)]
    assert names == sorted(names, key=skeleton.position.__getitem__)
    assert outermost(names) == frozenset(names)


@given(st.lists(selectors, min_size=2, max_size=4), skeletons(), st.randoms(use_true_random=False))
def test_operands_may_stand_in_any_order(parts: list[ir.Selector], skeleton: Skeleton, random: Any) -> None:
    """`and` and `or` do not depend on the order of what they join."""
    turned = list(parts)
    random.shuffle(turned)
    for join in (ir.AllOf, ir.AnyOf):
        assert select(join(selectors=tuple(parts)), skeleton) == select(join(selectors=tuple(turned)), skeleton)


@given(st.lists(selectors, min_size=1, max_size=4), skeletons())
def test_plans_do_not_depend_on_the_order_of_rules(parts: list[ir.Selector], skeleton: Skeleton) -> None:
    """Sites, their numbers and what hides them are the same in whatever order the rules stand."""
    rules = [ir.Rule(selector=each, optional=True, action=ir.Skip()) for each in parts]
    plans = [
        bind(resolve(ir.Policy(statements=tuple(order), source_name="<test>"), {}), skeleton)
        for order in (rules, rules[::-1])
    ]
    assert plans[0].sites == plans[1].sites
    for number, rule in enumerate(plans[0].rules):
        assert rule.sites == plans[1].rules[len(rules) - 1 - number].sites


@given(st.lists(selectors, min_size=1, max_size=4), skeletons())
def test_parents_are_the_sites_around(parts: list[ir.Selector], skeleton: Skeleton) -> None:
    """A site is hidden by exactly the sites whose module holds it, the outermost first."""
    rules = tuple(ir.Rule(selector=each, optional=True, action=ir.Skip()) for each in parts)
    plan = bind(resolve(ir.Policy(statements=rules, source_name="<test>"), {}), skeleton)
    by_name = {site.modules[0]: site.index for site in plan.sites}
    for site in plan.sites:
        around = [by_name[name] for name in [*ancestors(site.modules[0])][::-1] if name in by_name]
        assert tuple(around) == site.parents
        assert tuple(rule.index for rule in plan.rules if site.index in rule.sites) == plan.rules_of(site.index)


# --- blocks ----------------------------------------------------------------------------------------------

bounds = st.none() | st.integers(-20, 20)


@given(bounds, bounds)
def test_slices_clip_as_lists_do(start: int | None, stop: int | None) -> None:
    """`blocks[a:b]` takes what the same slice of a list takes; nothing is an error."""
    text = f"blocks[{'' if start is None else start}:{'' if stop is None else stop}]"
    expected = BLOCKS[start:stop]
    if expected:
        assert (expected,) == select(parse_selector(text), BUILTIN)
        assert [(block,) for block in expected] == list(select(parse_selector(f"each {text}"), BUILTIN))
    else:
        assert ["E202"] == codes(refused(f"match {text} every 2 -> reuse"))


@given(st.integers(-40, 40))
def test_indices_count_as_in_lists(index: int) -> None:
    """`blocks[i]` takes one block, counted from the end where negative."""
    if -len(BLOCKS) <= index < len(BLOCKS):
        assert [BLOCKS[index]] == taken(f"blocks[{index}]")
    else:
        assert ["E201"] == codes(refused(f"match blocks[{index}] every 2 -> reuse"))


def test_spans_run_over_the_lists_in_order() -> None:
    """All blocks are one span, over all lists that carry the hidden states."""
    (site,) = bound("match blocks every 2 -> reuse").sites
    assert BLOCKS == site.modules
    assert "transformer_blocks[0:8]+temporal_transformer_blocks[0:4]+single_transformer_blocks[0:4]" == site.name
    (site,) = bound("match blocks[1:-2] every 2 -> reuse").sites
    assert "transformer_blocks[1:8]+temporal_transformer_blocks[0:4]+single_transformer_blocks[0:2]" == site.name


def test_other_lists() -> None:
    """`of` names the lists, also those that are not directly under the root."""
    (site,) = bound('match blocks[1:] of "^single" every 2 -> reuse').sites
    assert "single_transformer_blocks[1:4]" == site.name
    nested = sites_skeleton([f"down.{level}.layers.{n}.attn" for level in range(2) for n in range(3)])
    (site,) = bound(r'match blocks of "^down\.1\.layers$" every 2 -> reuse', nested).sites
    assert ("down.1.layers.0", "down.1.layers.1", "down.1.layers.2") == site.modules
    assert ["E206"] == codes(refused('match blocks of "layers" every 2 -> reuse', nested))
    error = refused('match blocks of "lyers" every 2 -> reuse', nested)
    assert "did you mean `layers`?" in str(error)


def test_elements_of_a_list_are_taken_by_number() -> None:
    """Ten comes after nine."""
    skeleton = sites_skeleton([f"blocks.{n}.attn" for n in range(12)])
    (site,) = bound("match blocks[9:] every 2 -> reuse", skeleton).sites
    assert ("blocks.9", "blocks.10", "blocks.11") == site.modules


def test_parameters_as_positions() -> None:
    """The bounds of a span may be parameters."""
    text = "param head: int = 1\nmatch blocks[head:2 * head + 1] every 2 -> reuse"
    (site,) = bound(text, head=2).sites
    assert ("transformer_blocks.2", "transformer_blocks.3", "transformer_blocks.4") == site.modules


@pytest.mark.parametrize("one", ["blocks[0:4]", "blocks[2:6]", "blocks[5:]"])
@pytest.mark.parametrize("other", ["blocks[0:4]", "blocks[2:6]", "blocks[5:]", "blocks[1:3]", "blocks", "blocks[2]"])
def test_spans_meet_nest_or_are_refused(one: str, other: str) -> None:
    """Spans that share a block are one inside the other."""
    first, second = (set(select(parse_selector(each), BUILTIN)[0]) for each in (one, other))
    text = f"match {one} every 2 -> reuse\nmatch {other} every 3 -> reuse"
    if first & second and not (first <= second or second <= first):
        assert ["E203"] == codes(refused(text))
    else:
        plan = bound(text)
        assert len({frozenset(first), frozenset(second)}) == len(plan.sites)
        inner = min(plan.sites, key=lambda site: len(site.modules))
        nested = first != second and bool(first & second)
        assert (1 if nested else 0) == len(inner.parents)


def test_spans_hold_what_is_in_their_blocks() -> None:
    """Nesting goes by modules, whatever the order of the rules."""
    plan = bound('match "0.attn1$" every 2 -> reuse\nmatch blocks[0:2] every 2 -> reuse\nmatch model every 2 -> reuse')
    names = {site.name: site for site in plan.sites}
    root, span = names["model"], names["transformer_blocks[0:2]"]
    assert () == root.parents
    assert (root.index,) == span.parents
    assert (root.index, span.index) == names["transformer_blocks.0.attn1"].parents
    assert (root.index,) == names["temporal_transformer_blocks.0.attn1"].parents


def test_one_block_as_span_and_as_module() -> None:
    """`blocks[0]` and the module by its name are one site."""
    plan = bound('match blocks[0] every 2 -> reuse\nmatch "^transformer_blocks.0$" every 2 -> reuse')
    assert ["transformer_blocks.0"] == [site.name for site in plan.sites]
    assert (0, 1) == plan.rules_of(0)


# --- names and kinds -------------------------------------------------------------------------------------


def test_the_line_that_started_it() -> None:
    """A whole file of one line takes the attention modules and none of their parts."""
    plan = bound('match "^transformer_blocks.*attn" when 100<t<800 every 2 -> reuse')
    assert [f"transformer_blocks.{n}.attn{m}" for n in range(8) for m in (1, 2)] == [site.name for site in plan.sites]
    assert frozenset({"t"}) == plan.needs


def test_outermost_of_the_whole_result() -> None:
    """`not` works on all modules before the outermost are taken."""
    assert [f"transformer_blocks.{n}.attn1.to_q" for n in range(3)] == taken(
        '"^transformer_blocks.*attn1" and "to_q"', LATTE
    )
    assert taken('"attn1" and not "temporal"', LATTE) == [f"transformer_blocks.{n}.attn1" for n in range(3)]


def test_the_root_only_by_its_kind() -> None:
    """No regex, class or `not` takes the root."""
    assert [""] == taken("model")
    for selector in ('"^$"', '""', 'class "."', "not attention", 'model and "attn"'):
        assert "" not in taken(selector)
    assert [""] == taken('model or "attn"')


def test_lists_are_no_sites() -> None:
    """A ModuleList is never called, so its elements are taken instead."""
    assert ["transformer_blocks.0", "transformer_blocks.1", "transformer_blocks.2"] == taken(
        '"^transformer_blocks"', LATTE
    )


def test_pab_on_latte() -> None:
    """Temporal blocks take the temporal rule though the spatial names match inside theirs."""
    plan = bind(resolve(load("pab"), {"temporal_every": 3, "spatial_every": 2, "cross_every": 4}), LATTE)
    sites = {site.name: plan.rules_of(site.index) for site in plan.sites}
    for number in range(3):
        assert (0,) == sites[f"temporal_transformer_blocks.{number}.attn1"]
        assert (1,) == sites[f"transformer_blocks.{number}.attn1"]
        assert (2,) == sites[f"transformer_blocks.{number}.attn2"]
    assert () == plan.warnings


# --- what does not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "help"),
    [
        ('"^transfomer_blocks.*attn"', "did you mean `transformer_blocks`?"),
        ('"Transformer_Blocks"', "did you mean `transformer_blocks`?"),
        (r'"^transformer_blocks\.\d+\.atn1$"', "did you mean `attn1`?"),
        ('attention and "transfomer_blocks"', "did you mean `transformer_blocks`?"),
        ('class "Atention"', "did you mean `Attention`?"),
        ('"^zzzzzz"', "its parts are `patch_embed`"),
        ('attention and "norm"', "none of them in common"),
        ('self_attention and "attn2$"', "its parts take 16 and 8 modules, none of them in common"),
    ],
)
def test_near_names(selector: str, help: str) -> None:
    """A rule that takes nothing is an error with a way out."""
    error = refused(f"match {selector} every 2 -> reuse")
    assert ["E200"] == codes(error)
    assert help in str(error)


def test_a_kind_that_the_model_has_not() -> None:
    """The kinds that are there are named."""
    error = refused("match cross_attention every 2 -> reuse", sites_skeleton(["blocks.0.attn"]))
    assert "the model has no `cross_attention`" in str(error)


def test_optional_rules_may_take_nothing() -> None:
    """`optional` excuses, also blocks that are not there; a policy that takes nothing at all is doubtful."""
    plan = bound('match optional "nothing" every 2 -> reuse\nmatch attention every 2 -> reuse')
    assert () == plan.rules[0].sites
    assert () == plan.warnings
    plan = bound('match optional "nothing" when sigma > 1 every 2 -> reuse\nmatch optional blocks[99] every 2 -> reuse')
    assert ["W511"] == [each.code for each in plan.warnings]
    assert frozenset() == plan.needs


def test_all_errors_at_once() -> None:
    """Each rule that does not fit is named, with its place."""
    error = refused('match "a1" every 2 -> reuse\nmatch attention every 2 -> reuse\nmatch blocks[99] every 2 -> reuse')
    assert ["E200", "E201"] == codes(error)
    assert [1, 3] == [each.span.line for each in error.diagnostics if each.span]


def test_a_model_without_blocks() -> None:
    """Where no list is known, one can be named."""
    skeleton = Skeleton("plain", (Module("", "M"), Module("attn", "Attention", frozenset({"attention"}))))
    assert ["E205"] == codes(refused("match blocks every 2 -> reuse", skeleton))


def test_uncond_is_for_the_model() -> None:
    """A string parameter cannot smuggle `approximate uncond` below the root."""
    rule = ir.Rule(selector=ir.OfKind(of="attention"), action=ir.ApproximateUncond(method="spectral"))
    with pytest.raises(PolicyError, match="E209"):
        bind(resolve(ir.Policy(statements=(rule,), source_name="<test>"), {}), BUILTIN)


# --- what rules read -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "needs"),
    [
        ("match attention every 2 -> reuse", set()),
        ("match attention when step > 2 and age < 3 every 2 -> reuse", set()),
        ("match attention every 2 from end -> reuse", {"steps"}),
        ("match attention when progress > 0.5 every 2 -> reuse", {"progress"}),
        ("match attention when sigma > 1 every 2 -> reuse", {"sigma"}),
        ('match attention when branch == "cond" every 2 -> reuse', {"branch"}),
        ("match attention when uncond_skipped every 2 -> reuse", {"uncond_skipped"}),
        ("match attention every 2 -> reuse follow cond", {"branch"}),
        ("match attention every 2 at most steps / 2 in all -> reuse", {"steps"}),
        ("match attention every 2 -> predict linear(weight: t / 1000)", {"t"}),
        ("match attention when w[step] > 1 every 2 -> reuse", {"steps"}),
        ("match blocks[1:] while drift < 1 -> reuse", {"sigma"}),
    ],
)
def test_needs(rule: str, needs: set[str]) -> None:
    """A plan knows what the clock must tell, through lets, tables and signals too."""
    text = f"table w = [1, 2]\nsignal head = l1(input(blocks[0]))\nsignal drift = head * sigma\n{rule}\n"
    assert needs == bound(text).needs


# --- shadows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "shadowed"),
    [
        ("attention", "attention", True),
        ("attention", "self_attention", True),
        ("self_attention", "attention", False),
        ("attention when t > 100", "attention", False),
        ("attention when t > 100", "attention when t > 100 and step > 1", True),
        ("attention when t > 100", "attention when t > 200", True),
        ("attention when t > 200", "attention when t > 100", False),
        ("attention when t in (100, 800)", "attention when 200 < t < 300", True),
        ("attention when 100 < t < 800", "attention when 100 <= t < 800", False),
        ("attention when 100 <= t", "attention when t == 100", True),
        ("attention when t in (100, 800)", "attention when step in (200, 300)", False),
        ("attention when t > 100 and step > 3", "attention when step > 4 and t > 100", True),
        ("attention when step > 1", "attention when step > 1 and 1 == 2", False),
        ("attention when step > 1 and 1 == 2", "attention when step > 1", False),
        ("each blocks", "blocks", False),
    ],
)
def test_shadowed_rules(first: str, second: str, shadowed: bool) -> None:
    """A rule that can never decide is a warning that names the rule before it."""
    plan = bound(f"match {first} every 2 -> reuse\nmatch {second} every 3 -> reuse")
    assert (["W510"] if shadowed else []) == [each.code for each in plan.warnings]
    assert all("rule 1" in each.message for each in plan.warnings)


def test_shadowed_by_several() -> None:
    """Rules that take all sites between them shadow a rule together."""
    plan = bound(
        "match self_attention every 2 -> reuse\nmatch cross_attention every 2 -> reuse\n"
        "match attention every 3 -> reuse\n"
    )
    (warning,) = plan.warnings
    assert "rule 1" in warning.message
    assert "rule 2" in warning.message


# --- probes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signal", "rule", "code"),
    [
        ("l1(residual(blocks[0]))", "blocks[1:]", None),
        ("l1(residual(blocks[0:4]))", "blocks[4:]", None),
        ("l1(residual(blocks[0]))", "blocks", "E208"),
        ("l1(residual(blocks[3]))", "blocks[1:]", "E208"),
        ("l1(residual(blocks[3]))", "blocks[1:3]", "E208"),
        ('l1(output("^transformer_blocks.0.norm1$"))', "blocks", None),
        ('l1(output("^transformer_blocks.0.norm1$"))', "each blocks[0:2]", None),
        ('l1(output("^transformer_blocks.1.norm1$"))', "blocks", "E208"),
        ("l1(input(blocks[0]))", "blocks", None),
        ("l1(input(model))", "model", None),
        ("l1(output(model))", "model", "E208"),
        ("l1(output(model))", "attention", "E208"),
        ("l1(kept(output(model)))", "model", None),
        ("l1(prev(output(model)))", "model", None),
        ('l1(argument(model, "temb"))', "blocks", None),
        ('l1(output("^patch_embed$"))', "blocks", None),
        ('l1(output("attn"))', "blocks", "E207"),
        ('l1(output("nothing"))', "blocks", "E207"),
        ("l1(output(attention))", "blocks", "E207"),
    ],
)
def test_probes(signal: str, rule: str, code: str | None) -> None:
    """A probe takes one site, and is there before the rule that reads it decides."""
    text = f"signal s = {signal}\nmatch {rule} while s < 1 -> reuse\n"
    if code is None:
        (place,) = bound(text).probes.values()
        assert place.modules
    else:
        assert [code] == codes(refused(text))


def test_probes_that_no_rule_reads() -> None:
    """A signal that nothing reads is not looked for in the model."""
    assert {} == bound('signal s = l1(output("nothing"))\nmatch attention every 2 -> reuse\n').probes


def test_labels_are_short() -> None:
    """A rule's label is its text, cut where it is long."""
    (rule,) = resolve(load("fora"), {}).rules
    assert "match attention or feedforward every 3 from end -> reuse" == label(rule)
    assert "match attention or…" == label(rule, width=19)


windows = st.sampled_from(
    ["", "when t > 300", "when t > 500", "when t in (200, 700)", "when 300 <= t < 600", "when step > 2 and t > 300"]
)
rules = st.lists(
    st.builds(
        lambda selector, when, every: f"match {selector} {when} every {every} -> reuse\n",
        st.sampled_from(["attention", "self_attention", "cross_attention", '"0.attn"', "feedforward"]),
        windows,
        st.integers(1, 4),
    ),
    min_size=2,
    max_size=5,
)


@given(rules, st.integers(1, 12))
def test_a_shadowed_rule_never_decides(texts: list[str], steps: int) -> None:
    """What is warned of never owns a site in any schedule."""
    plan = bound("".join(texts))
    schedule = simulate(plan, steps=steps)
    owners = {decision.rule for _, decisions in schedule for decision in decisions}
    warned = {each.span.line - 1 for each in plan.warnings if each.code == "W510" and each.span}
    assert set() == owners & warned
