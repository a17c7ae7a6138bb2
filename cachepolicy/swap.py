"""Interception: an object's class is swapped for a generated subclass that overrides one method, and swapped back.

The subclass keeps the name, qualified name and module of its class, and on an instance without our attribute it does
nothing but call through. The reasons for this mechanism are in docs/decisions/0003-class-swap.md.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Models are called with anything and return anything: what comes out of it has no type to know.

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

ATTRIBUTE = "_cachepolicy"
"""The one attribute that an intercepted object carries in its `__dict__`."""

Method = Callable[..., Any]
Override = Callable[[Method], Method]

_generated: dict[tuple[type, Override], type] = {}


def swap(target: Any, methods: dict[str, Override], handle: object) -> None:
    """Intercept `methods` of one object; each override is given the original and must call it to go through.

    `handle` is what the overrides find under `target.__dict__[ATTRIBUTE]`.
    """
    attributes: dict[str, Any] = target.__dict__
    # The class first: where it cannot be changed nothing is left behind.
    target.__class__ = _subclass(type(target), tuple(methods.items()))
    attributes[ATTRIBUTE] = handle


def restore(target: Any) -> None:
    """Give the object its own class and `__dict__` back.

    Where somebody else has swapped the class after us, ours stays below theirs and calls through.
    """
    target.__dict__.pop(ATTRIBUTE, None)
    base = type(target).__dict__.get("_cachepolicy_class")
    if base is not None:
        target.__class__ = base


def is_swapped(target: Any) -> bool:
    """True while the object carries a handle of ours."""
    return ATTRIBUTE in getattr(target, "__dict__", ())


@functools.cache
def _subclass(base: type, methods: tuple[tuple[str, Override], ...]) -> type:
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_cachepolicy_class": base,
    }
    for name, override in methods:
        original = getattr(base, name)
        namespace[name] = functools.wraps(original)(override(original))
    return type(base)(base.__name__, (base,), namespace)


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the plain class, without us: they run with their own weights and no policy."""
    generated = type(self)
    plain = _plain(generated)
    reduced: Any = super(generated, self).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple):
        return reduced
    build, arguments, *rest = reduced
    arguments = tuple(plain if each is generated else each for each in arguments)
    match build:
        case copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue] # pickle holds its class against the object's
            build = plain.__new__
        case copyreg.__newobj_ex__:  # pyright: ignore[reportAttributeAccessIssue]
            build, arguments = functools.partial(plain.__new__, plain, *arguments[1], **arguments[2]), ()  # pyright: ignore[reportCallIssue]
        case _:
            build = plain if build is generated else build
    return build, arguments, *map(_without_us, rest[:1]), *rest[1:]


def _without_us(state: Any) -> Any:
    """The state without our attribute; where there are slots it is a pair."""
    if isinstance(state, tuple):
        return tuple(map(_without_us, state))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(state, dict) and ATTRIBUTE in state:
        return {name: value for name, value in state.items() if name != ATTRIBUTE}  # pyright: ignore[reportUnknownVariableType]
    return state


def _plain(cls: type) -> type:
    return cls.__dict__.get("_cachepolicy_class", cls)
