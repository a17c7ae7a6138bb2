"""What a selector takes in a model: modules by name, kind and class, and spans of blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import assert_never

from cachepolicy.errors import Diagnostic, PolicyError, counted, nearest
from cachepolicy.language import ir
from cachepolicy.language.patterns import search_all
from cachepolicy.language.traversal import walk
from cachepolicy.planning.module_tree import Skeleton, ancestors

Modules = tuple[str, ...]
"""The names of the modules of one site, in the order they run: several for a span of blocks."""


def select(selector: ir.Selector, skeleton: Skeleton) -> tuple[Modules, ...]:
    """Returns the sites that a selector takes, as `Selection.select`."""
    return Selection(skeleton, [selector]).select(selector)


def outermost(names: Iterable[str]) -> frozenset[str]:
    """Returns the names that are inside no other of them."""
    taken = frozenset(names)
    return frozenset(name for name in taken if not any(outer in taken for outer in ancestors(name)))


class Selection:
    """Evaluates selectors on one module tree. All patterns are matched at once, with each name one time.

    Args:
        skeleton: The module tree.
        sources: Rules, signals or selectors that hold all selectors that will be asked for.
    """

    def __init__(self, skeleton: Skeleton, sources: Iterable[ir.Node]) -> None:
        self.skeleton = skeleton
        nodes = [node for source in sources for node in walk(source)]
        patterns = [node.regex for node in nodes if isinstance(node, ir.Pattern)]
        patterns += [node.of for node in nodes if isinstance(node, ir.Blocks) and node.of is not None]
        self._by_name = search_all(patterns, [module.name for module in skeleton.modules])
        classes = [node.regex for node in nodes if isinstance(node, ir.OfClass)]
        self._by_class = search_all(classes, list({module.class_name for module in skeleton.modules}))
        self._selected: dict[ir.Selector, tuple[Modules, ...]] = {}

    @cached_property
    def names(self) -> frozenset[str]:
        """Modules that can be a site, without the root, which only the kind `model` takes."""
        return frozenset(module.name for module in self.skeleton.modules[1:] if module.selectable)

    @cached_property
    def _kinds(self) -> dict[str, frozenset[str]]:
        kinds: dict[str, set[str]] = {}
        for module in self.skeleton.modules[1:]:
            for kind in module.kinds if module.selectable else ():
                kinds.setdefault(kind, set()).add(module.name)
        return {kind: frozenset(names) for kind, names in kinds.items()}

    def select(self, selector: ir.Selector) -> tuple[Modules, ...]:
        """Returns the sites that a selector takes, in model order.

        These are the outermost modules of its whole result, or one span of blocks. Equal selectors give the same tuple.

        Raises:
            PolicyError: The model has no such block or slice (E201, E202), a span is among other selectors (E204), the
                model or list has no blocks (E205, E206).
        """
        if selector not in self._selected:
            if isinstance(selector, ir.Blocks) and not selector.each:
                self._selected[selector] = (_blocks(selector, self),)
            else:
                taken = sorted(outermost(self.members(selector)), key=self.skeleton.position.__getitem__)
                self._selected[selector] = tuple((name,) for name in taken)
        return self._selected[selector]

    def members(self, selector: ir.Selector) -> frozenset[str]:
        """Returns all modules that a selector takes, also modules inside others."""
        match selector:
            case ir.Pattern():
                return self._by_name[selector.regex] & self.names
            case ir.OfClass():
                classes = self._by_class[selector.regex]
                return frozenset(name for name in self.names if self.skeleton[name].class_name in classes)
            case ir.OfKind(of="model"):
                return frozenset({""})
            case ir.OfKind():
                return self._kinds.get(selector.of, frozenset())
            case ir.AllOf():
                first, *others = map(self.members, selector.selectors)
                return first.intersection(*others)
            case ir.AnyOf():
                return frozenset[str]().union(*map(self.members, selector.selectors))
            case ir.NoneOf():
                return self.names - self.members(selector.selector)
            case ir.Within():
                inside = selector.inside
                outer = frozenset(_blocks(inside, self)) if isinstance(inside, ir.Blocks) else self.members(inside)
                taken = self.members(selector.selector)
                return frozenset(name for name in taken if name and not outer.isdisjoint(ancestors(name)))
            case ir.Blocks():
                if not selector.each:
                    help = "`each blocks` takes the blocks one by one"
                    raise _error("E204", "a span of blocks stands alone in a selector", selector, help)
                return frozenset(_blocks(selector, self))
            case ir.Itself():
                raise _error("E207", "`self` stands in a probe only", selector)
            case ir.PatternParam():
                raise _error("E164", f"the parameter `{selector.name}` has no value here", selector)
            case _:
                assert_never(selector)

    def lists(self, regex: str) -> frozenset[str]:
        """Returns the outermost ModuleLists whose names match a pattern."""
        return outermost(name for name in self._by_name[regex] if self.skeleton[name].is_list)


def _error(code: str, message: str, node: ir.Node, help: str | None = None) -> PolicyError:
    return PolicyError([Diagnostic(code, message, span=node.span, help=help)])


# --- blocks ----------------------------------------------------------------------------------------------


def _blocks(node: ir.Blocks, selection: Selection) -> Modules:
    skeleton = selection.skeleton
    lists = _lists(node, selection)
    every = tuple(block for name in lists for block in skeleton.elements[name])
    shared = next((name for name in lists if name in skeleton.sharing), None)
    if shared is not None and not (node.index is node.start is node.stop is node.stride is None):
        help = "select the modules by name, or all `blocks`"
        message = f"`{shared}` holds a module that is also at another place, so its elements have no positions"
        raise _error("E206", message, node, help)
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
    taken = every[_bound(node.start) : _bound(node.stop) : _bound(node.stride)]
    if not taken:
        raise _error("E202", f"the slice of blocks is empty: the model has {len(every)}", node)
    return taken


def _bound(position: ir.Expression | None) -> int | None:
    return None if position is None else _position(position)


def _position(position: ir.Expression) -> int:
    if not isinstance(position, ir.Number):
        raise _error("E163", "the position of a block is a constant whole number", position)
    return int(position.value)


def _lists(node: ir.Blocks, selection: Selection) -> tuple[str, ...]:
    """Returns the lists that `of` names, in model order, or the block lists of the model."""
    skeleton = selection.skeleton
    if node.of is None:
        return skeleton.block_lists
    lists = tuple(sorted(selection.lists(node.of), key=skeleton.position.__getitem__))
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


def why_nothing(selector: ir.Selector, selection: Selection) -> str | None:
    """Returns a help sentence for a selector that takes nothing: near names, or the part of it that takes nothing."""
    skeleton = selection.skeleton
    names = [module.name for module in skeleton.modules[1:]]
    for part in _wanted(selector):
        if not isinstance(part, ir.Pattern | ir.OfKind | ir.OfClass) or selection.members(part):
            continue
        match part:
            case ir.Pattern():
                hint = near_name(part.regex, names)
            case ir.OfClass():
                hint = near_name(part.regex, [module.class_name for module in skeleton.modules[1:]])
            case _:
                hint = f"the model has no `{part.of}`; {_few('its kinds are', _kinds(skeleton))}"
        return hint or _few("its parts are", _roots(skeleton))
    if isinstance(selector, ir.AllOf):
        *counts, last = (len(selection.members(part)) for part in selector.selectors)
        return f"its parts take {', '.join(map(str, counts))} and {counted(last, 'module')}, none of them in common"
    return None


def _wanted(selector: ir.Selector) -> Iterator[ir.Selector]:
    """Yields the parts that must take something, without those that `not` excludes."""
    match selector:
        case ir.AllOf() | ir.AnyOf():
            for part in selector.selectors:
                yield from _wanted(part)
        case ir.NoneOf():
            pass
        case ir.Within():
            yield from _wanted(selector.selector)
            yield from _wanted(selector.inside)
        case _:
            yield selector


def near_name(regex: str, names: Iterable[str]) -> str | None:
    """Returns `did you mean ...?` for the first word of a regex that is in no segment of a name."""
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
    """Returns the words of a regex that may be meant as names: its letters, without escapes."""
    return [word for word in re.split(r"\\.|\W", regex) if len(word) > 1 and not word.isdecimal()]


def _kinds(skeleton: Skeleton) -> list[str]:
    return sorted({kind for module in skeleton.modules for kind in module.kinds})


def _roots(skeleton: Skeleton) -> list[str]:
    return [module.name for module in skeleton.modules[1:] if "." not in module.name]


def _few(start: str, names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return f"{start} {shown}" + (", ..." if len(names) > 8 else "")
