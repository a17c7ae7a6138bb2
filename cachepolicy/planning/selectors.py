"""What a selector takes in a model: modules by name, kind and class, and spans of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import assert_never

from cachepolicy.errors import Diagnostic, PolicyError, counted, nearest
from cachepolicy.language import ir
from cachepolicy.language.patterns import searcher
from cachepolicy.planning.module_tree import Skeleton, ancestors

Modules = tuple[str, ...]
"""The names of the modules that one site covers, in the order they run: several for a span of blocks."""


def select(selector: ir.Selector, skeleton: Skeleton) -> tuple[Modules, ...]:
    """The sites that the selector takes, in model order: the outermost of its whole result, or one span of blocks.

    Raises:
        PolicyError: a position or slice of blocks that the model has not (E201, E202), a span among other selectors
            (E204), a model or list without blocks (E205, E206).
    """
    if isinstance(selector, ir.Blocks) and not selector.each:
        return (_blocks(selector, skeleton),)
    taken = _members(selector, skeleton, _names(skeleton))
    return tuple((name,) for name in sorted(outermost(taken), key=skeleton.position.__getitem__))


def outermost(names: Iterable[str]) -> frozenset[str]:
    """The names that stand inside no other of them."""
    taken = frozenset(names)
    return frozenset(name for name in taken if not any(outer in taken for outer in ancestors(name)))


def _members(selector: ir.Selector, skeleton: Skeleton, among: frozenset[str]) -> frozenset[str]:
    """What a selector takes of `among`, which never holds the root; the root and blocks are given as they are."""
    match selector:
        case ir.Pattern():
            matches = searcher(selector.regex)
            return frozenset(name for name in among if matches(name))
        case ir.OfClass():
            matches = searcher(selector.regex)
            return frozenset(name for name in among if matches(skeleton[name].class_name))
        case ir.OfKind(of="model"):
            return frozenset({""})
        case ir.OfKind():
            return frozenset(name for name in among if selector.of in skeleton[name].kinds)
        case ir.AllOf():
            # Each selector looks at what the ones before it have left: a kind spares the regexes most of a model.
            taken: frozenset[str] | None = None
            for each in selector.selectors:
                left = among if taken is None else taken - {""}
                members = _members(each, skeleton, left)
                taken = members if taken is None else taken & members
            return taken or frozenset()
        case ir.AnyOf():
            return frozenset[str]().union(*(_members(each, skeleton, among) for each in selector.selectors))
        case ir.NoneOf():
            return among - _members(selector.selector, skeleton, among)
        case ir.Blocks():
            if not selector.each:
                help = "`each blocks` takes the blocks one by one"
                raise _error("E204", "a span of blocks stands alone in a selector", selector, help)
            return frozenset(_blocks(selector, skeleton))
        case ir.PatternParam():
            raise _error("E164", f"the parameter `{selector.name}` has no value here", selector)
        case _:
            assert_never(selector)


def _names(skeleton: Skeleton) -> frozenset[str]:
    """Every module that can be a site, but the root: only the kind `model` takes that."""
    return frozenset(module.name for module in skeleton.modules[1:] if module.selectable)


def _error(code: str, message: str, node: ir.Node, help: str | None = None) -> PolicyError:
    return PolicyError([Diagnostic(code, message, span=node.span, help=help)])


# --- blocks ----------------------------------------------------------------------------------------------


def _blocks(node: ir.Blocks, skeleton: Skeleton) -> Modules:
    every = tuple(block for name in _lists(node, skeleton) for block in skeleton.elements[name])
    for block in every:
        if not skeleton[block].selectable:
            raise _error("E206", f"`{block}` is no block that can be called", node)
    if not every:
        raise _error("E205", "the model has no blocks", node, 'name a list of them: `blocks of "^layers$"`')
    if node.index is not None:
        index = _position(node.index)
        if not -len(every) <= index < len(every):
            raise _error("E201", f"there is no block {index}: the model has {len(every)}", node)
        return (every[index],)
    taken = every[_bound(node.start) : _bound(node.stop)]
    if not taken:
        raise _error("E202", f"the slice of blocks is empty: the model has {len(every)}", node)
    return taken


def _bound(position: ir.Expression | None) -> int | None:
    return None if position is None else _position(position)


def _position(position: ir.Expression) -> int:
    if not isinstance(position, ir.Number):
        raise _error("E163", "the position of a block is a constant whole number", position)
    return int(position.value)


def _lists(node: ir.Blocks, skeleton: Skeleton) -> tuple[str, ...]:
    """The lists that `of` names, in model order, else the model's own."""
    if node.of is None:
        return skeleton.block_lists
    matches = searcher(node.of)
    named = outermost(module.name for module in skeleton.modules if module.is_list and matches(module.name))
    lists = tuple(sorted(named, key=skeleton.position.__getitem__))
    if not lists:
        every = [module.name for module in skeleton.modules if module.is_list]
        outer = sorted(outermost(every), key=skeleton.position.__getitem__)
        help = near_name(node.of, every) or (_few("the outermost lists are", outer) if outer else None)
        raise _error("E205", f'no list of blocks matches `of "{node.of}"`', node, help)
    if len({name.rpartition(".")[0] for name in lists}) > 1:
        shown = ", ".join(f"`{name}`" for name in lists[:3])
        escaped = lists[0].replace(".", r"\.")
        help = f'name one: `of "^{escaped}$"`'
        raise _error("E206", f"the lists {shown} do not run one after another", node, help)
    return lists


# --- why nothing matches ---------------------------------------------------------------------------------


def why_nothing(selector: ir.Selector, skeleton: Skeleton) -> str | None:
    """A help sentence for a selector that takes nothing: near names, or which part of it takes nothing."""
    names = [module.name for module in skeleton.modules[1:]]
    for part in _wanted(selector):
        if not isinstance(part, ir.Pattern | ir.OfKind | ir.OfClass) or _members(part, skeleton, _names(skeleton)):
            continue
        match part:
            case ir.Pattern():
                found = near_name(part.regex, names)
            case ir.OfClass():
                found = near_name(part.regex, [module.class_name for module in skeleton.modules[1:]])
            case _:
                found = f"the model has no `{part.of}`; {_few('its kinds are', _kinds(skeleton))}"
        return found or _few("its parts are", _roots(skeleton))
    if isinstance(selector, ir.AllOf):
        *counts, last = (len(_members(part, skeleton, _names(skeleton))) for part in selector.selectors)
        return f"its parts take {', '.join(map(str, counts))} and {counted(last, 'module')}, none of them in common"
    return None


def _wanted(selector: ir.Selector) -> Iterator[ir.Selector]:
    """The parts that must take something, not those that `not` excludes."""
    match selector:
        case ir.AllOf() | ir.AnyOf():
            for part in selector.selectors:
                yield from _wanted(part)
        case ir.NoneOf():
            pass
        case _:
            yield selector


def near_name(regex: str, names: Iterable[str]) -> str | None:
    """`did you mean ...?` for the first word of a regex that no name has, segment by segment of the names."""
    segments = sorted({segment for name in names for segment in name.split(".") if not segment.isdecimal()})
    lowered = {segment.lower(): segment for segment in segments}
    for word in _words(regex):
        if any(word in segment for segment in segments):
            continue
        near = lowered.get(word.lower()) or nearest(word, segments)
        if near is not None and near != word:
            return f"did you mean `{near}`?"
    return None


def _words(regex: str) -> list[str]:
    """The words of a regex that could be meant as names: its letters, without escapes."""
    words, word = list[str](), ""
    escaped = False
    for letter in regex + " ":
        if not escaped and (letter.isalnum() or letter == "_"):
            word += letter
        else:
            words.append(word)
            word = ""
        escaped = letter == "\\" and not escaped
    return [each for each in words if len(each) > 1 and not each.isdecimal()]


def _kinds(skeleton: Skeleton) -> list[str]:
    return sorted({kind for module in skeleton.modules for kind in module.kinds})


def _roots(skeleton: Skeleton) -> list[str]:
    return [module.name for module in skeleton.modules[1:] if "." not in module.name]


def _few(what: str, names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return f"{what} {shown}" + (", ..." if len(names) > 8 else "")
