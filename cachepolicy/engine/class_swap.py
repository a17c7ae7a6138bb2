"""Intercepts methods of an object by swapping its class for a generated subclass, and swaps it back.

The subclass keeps the name, qualified name and module of its base class. On an instance without the handle attribute,
the overrides only call the original method. docs/decisions/0003-class-swap.md gives the reasons for this mechanism.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Inputs and outputs of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import copyreg
import functools
import threading
from collections.abc import Callable
from typing import Any

ATTRIBUTE = "_cachepolicy"
"""The only attribute that the engine adds to the `__dict__` of an intercepted object."""

Method = Callable[..., Any]
Override = Callable[[Method], Method]
Methods = tuple[tuple[str, Override], ...]


class Handle:
    """State that an intercepted object carries. Copies and pickles of the object do not carry it."""

    __slots__ = ()

    def __deepcopy__(self, memo: object) -> None: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_generated: dict[tuple[type, Methods], tuple[type, dict[str, Any]]] = {}
_generating = threading.Lock()


def swap(target: Any, methods: dict[str, Override], handle: object) -> None:
    """Intercept methods of one object.

    A class that torch's parametrizations created for this one object stays the outermost class, so that torch can
    remove it later.

    Args:
        target: The object.
        methods: Overrides by method name. Each is called with the original method and must call it to pass through.
        handle: Stored in `target.__dict__[ATTRIBUTE]`, where the overrides find it.
    """
    attributes: dict[str, Any] = target.__dict__
    wanted = tuple(methods.items())
    own = _own(target)
    # Set the class before the attribute: if the class cannot be changed, the object stays untouched.
    if any(cls.__dict__.get("_cachepolicy_methods") == wanted for cls in type(target).__mro__):
        pass  # our class stayed below a foreign one when an earlier policy was removed
    elif own is None:
        target.__class__ = _subclass(plain(type(target)), wanted)
    else:
        own.__bases__ = (_subclass(plain(own.__bases__[0]), wanted),)
    attributes[ATTRIBUTE] = handle


def restore(target: Any) -> None:
    """Restore the class and the `__dict__` of the object.

    If foreign code has swapped the class later, our class stays below it and only calls through.
    """
    target.__dict__.pop(ATTRIBUTE, None)
    own = _own(target)
    if own is not None:
        own.__bases__ = (plain(own.__bases__[0]),)
    elif plain(type(target)) is not type(target):
        target.__class__ = plain(type(target))


def is_swapped(target: Any) -> bool:
    """Return True while the object carries a handle."""
    return getattr(target, "__dict__", {}).get(ATTRIBUTE) is not None


def intercepts(target: Any, methods: dict[str, Override], handle: object) -> bool:
    """Return True while the object carries this handle and a class that overrides these methods."""
    if getattr(target, "__dict__", {}).get(ATTRIBUTE) is not handle:
        return False
    wanted = tuple(methods.items())
    return any(cls.__dict__.get("_cachepolicy_methods") == wanted for cls in type(target).__mro__)


def _own(target: Any) -> type | None:
    """Return the class that torch's parametrizations created for this module, or None."""
    cls = type(target)
    private = cls.__module__ == "torch.nn.utils.parametrize" and cls.__name__.startswith("Parametrized")
    return cls if private and len(cls.__bases__) == 1 else None


def _subclass(base: type, methods: Methods) -> type:
    """Return the cached generated class, or a new one if foreign code has modified it."""
    with _generating:
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
    """Return the class that defines the original method, skipping generated classes in the MRO."""
    return next(cls for cls in base.__mro__ if name in cls.__dict__ and "_cachepolicy_class" not in cls.__dict__)


def _reduce(self: Any, protocol: Any) -> Any:
    """Reduce copies and pickles to the original class: they have their own weights and no policy."""
    generated = next(cls for cls in type(self).__mro__ if "_cachepolicy_class" in cls.__dict__)
    own = plain(generated)
    reduced: Any = super(generated, self).__reduce_ex__(protocol)
    if not isinstance(reduced, tuple):
        return reduced
    build, arguments, *rest = reduced
    arguments = tuple(own if argument is generated else argument for argument in arguments)
    match build:
        case copyreg.__newobj__:  # pyright: ignore[reportAttributeAccessIssue] # pickle holds its class against the object's
            build = own.__new__
        case copyreg.__newobj_ex__:  # pyright: ignore[reportAttributeAccessIssue]
            build, arguments = functools.partial(own.__new__, own, *arguments[1], **arguments[2]), ()  # pyright: ignore[reportCallIssue]
        case _:
            build = own if build is generated else build
    return build, arguments, *map(_without_us, rest[:1]), *rest[1:]


def _without_us(state: Any) -> Any:
    """Return the state without the handle attribute. Objects with slots have a pair as state."""
    if isinstance(state, tuple):
        return tuple(map(_without_us, state))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(state, dict) and ATTRIBUTE in state:
        return {name: value for name, value in state.items() if name != ATTRIBUTE}  # pyright: ignore[reportUnknownVariableType]
    return state


def plain(cls: type) -> type:
    """Return the original of a generated class. Any other class is returned as it is."""
    return cls.__dict__.get("_cachepolicy_class", cls)
