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
Methods = tuple[tuple[str, Override], ...]


class Handle:
    """What an intercepted object carries; a copy of the object, however it is made, does not carry it on."""

    __slots__ = ()

    def __deepcopy__(self, memo: object) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_generated: dict[tuple[type, Methods], tuple[type, dict[str, Any]]] = {}


def swap(target: Any, methods: dict[str, Override], handle: object) -> None:
    """Intercept `methods` of one object; each override is given the original and must call it to go through.

    `handle` is what the overrides find under `target.__dict__[ATTRIBUTE]`. A class that was made for this one object
    alone, as torch's parametrizations make one, stays on top, so that its maker can take it off again.
    """
    attributes: dict[str, Any] = target.__dict__
    wanted = tuple(methods.items())
    own = _own(target)
    # The class first: where it cannot be changed nothing is left behind.
    if any(cls.__dict__.get("_cachepolicy_methods") == wanted for cls in type(target).__mro__):
        pass  # left below somebody else's class when a policy was taken off
    elif own is None:
        target.__class__ = _subclass(plain(type(target)), wanted)
    else:
        own.__bases__ = (_subclass(plain(own.__bases__[0]), wanted),)
    attributes[ATTRIBUTE] = handle


def restore(target: Any) -> None:
    """Give the object its own class and `__dict__` back.

    Where somebody else has swapped the class after us, ours stays below theirs and calls through.
    """
    target.__dict__.pop(ATTRIBUTE, None)
    own = _own(target)
    if own is not None:
        own.__bases__ = (plain(own.__bases__[0]),)
    elif plain(type(target)) is not type(target):
        target.__class__ = plain(type(target))


def is_swapped(target: Any) -> bool:
    """True while the object carries a handle of ours."""
    return getattr(target, "__dict__", {}).get(ATTRIBUTE) is not None


def intercepts(target: Any, methods: dict[str, Override], handle: object) -> bool:
    """True while the object carries this handle, and a class of ours that overrides these methods."""
    if getattr(target, "__dict__", {}).get(ATTRIBUTE) is not handle:
        return False
    wanted = tuple(methods.items())
    return any(cls.__dict__.get("_cachepolicy_methods") == wanted for cls in type(target).__mro__)


def _own(target: Any) -> type | None:
    """The class that torch's parametrizations made for this one module; None where there is none."""
    cls = type(target)
    private = cls.__module__ == "torch.nn.utils.parametrize" and cls.__name__.startswith("Parametrized")
    return cls if private and len(cls.__bases__) == 1 else None


def _subclass(base: type, methods: Methods) -> type:
    """The generated class, made once; a new one where somebody has changed it meanwhile."""
    known = _generated.get((base, methods))
    if known is None or dict(known[0].__dict__) != known[1]:
        cls = _generate(base, methods)
        known = _generated[base, methods] = cls, dict(cls.__dict__)
    return known[0]


def _generate(base: type, methods: Methods) -> type:
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        "_cachepolicy_class": base,
        "_cachepolicy_methods": methods,
    }
    for name, override in methods:
        original = getattr(_beyond_us(base, name), name)
        namespace[name] = functools.wraps(original)(override(original))
    return type(base)(base.__name__, (base,), namespace)


def _beyond_us(base: type, name: str) -> type:
    """The class whose method is overridden: not one of ours that somebody else's class has kept below it."""
    return next(cls for cls in base.__mro__ if name in cls.__dict__ and "_cachepolicy_class" not in cls.__dict__)


def _reduce(self: Any, protocol: Any) -> Any:
    """Copies and pickles are of the plain class, without us: they run with their own weights and no policy."""
    generated = next(cls for cls in type(self).__mro__ if "_cachepolicy_class" in cls.__dict__)
    own = plain(generated)
    reduced: Any = super(generated, self).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple):
        return reduced
    build, arguments, *rest = reduced
    arguments = tuple(own if each is generated else each for each in arguments)
    match build:
        case copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue] # pickle holds its class against the object's
            build = own.__new__
        case copyreg.__newobj_ex__:  # pyright: ignore[reportAttributeAccessIssue]
            build, arguments = functools.partial(own.__new__, own, *arguments[1], **arguments[2]), ()  # pyright: ignore[reportCallIssue]
        case _:
            build = own if build is generated else build
    return build, arguments, *map(_without_us, rest[:1]), *rest[1:]


def _without_us(state: Any) -> Any:
    """The state without our attribute; where there are slots it is a pair."""
    if isinstance(state, tuple):
        return tuple(map(_without_us, state))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(state, dict) and ATTRIBUTE in state:
        return {name: value for name, value in state.items() if name != ATTRIBUTE}  # pyright: ignore[reportUnknownVariableType]
    return state


def plain(cls: type) -> type:
    """The class that a generated one was made from; any other is itself."""
    return cls.__dict__.get("_cachepolicy_class", cls)
