"""Interception by class: what a swapped object is, and that it goes back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from cachepolicy.engine.class_swap import ATTRIBUTE, is_swapped, restore, swap


def doubling(original: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        handle = self.__dict__.get(ATTRIBUTE)
        result = original(self, *args, **kwargs)
        return result if handle is None else handle * result

    return __call__


def tripling(original: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return 3 * original(self, *args, **kwargs)

    return __call__


class Thing:
    """A plain object."""

    def __init__(self) -> None:
        self.value = 1

    def __call__(self, x: float) -> float:
        return self.value + x


class Slotted(Thing):
    """One with slots beside its `__dict__`."""

    __slots__ = ("extra",)


def test_an_intercepted_object_keeps_its_class_by_name() -> None:
    """Name, qualified name, module, docstring and `isinstance` are those of the plain class."""
    thing = Thing()
    swap(thing, {"__call__": doubling}, 2)
    cls = type(thing)
    assert ("Thing", Thing.__qualname__, __name__, Thing.__doc__) == (
        cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__,
    )  # fmt: skip
    assert isinstance(thing, Thing)
    assert 6 == thing(2)


def test_restore_gives_class_and_dict_back() -> None:
    """Nothing is left, and restoring twice is harmless."""
    thing = Thing()
    before = dict(thing.__dict__)
    swap(thing, {"__call__": doubling}, 2)
    assert is_swapped(thing)
    for _ in range(2):
        restore(thing)
        assert Thing is type(thing)
        assert before == thing.__dict__
        assert not is_swapped(thing)


def test_what_was_left_below_another_class_does_not_act_twice() -> None:
    """Somebody swapped the class after us and stayed: the next interception, of either kind, acts once."""
    thing = Thing()
    swap(thing, {"__call__": doubling}, 2)
    thing.__class__ = type("Theirs", (type(thing),), {})
    restore(thing)
    assert 3 == thing(2)
    swap(thing, {"__call__": doubling}, 2)
    assert (6, "Theirs") == (thing(2), type(thing).__name__)
    restore(thing)
    swap(thing, {"__call__": tripling}, 2)
    assert 9 == thing(2)
    restore(thing)
    assert 3 == thing(2)


def test_a_generated_class_that_somebody_changed_is_not_used_again() -> None:
    """What another library put on the class of an intercepted object stays with that object."""
    one, other = Thing(), Thing()
    swap(one, {"__call__": doubling}, 2)
    type(one).__call__ = lambda self, x: 100
    swap(other, {"__call__": doubling}, 2)
    assert (100, 6) == (one(2), other(2))
    restore(one)
    assert 3 == one(2)


def test_other_objects_of_the_class_are_left_alone() -> None:
    """Only the one object changes."""
    one, other = Thing(), Thing()
    swap(one, {"__call__": doubling}, 2)
    assert (4, 2) == (one(1), other(1))
    assert Thing is type(other)


def test_one_class_is_generated_per_class_and_override() -> None:
    """Objects of one class share the generated one, so that compiled graphs are shared too."""
    one, other, third = Thing(), Thing(), Thing()
    swap(one, {"__call__": doubling}, 2)
    swap(other, {"__call__": doubling}, 5)
    swap(third, {"__call__": tripling}, 5)
    assert type(one) is type(other)
    assert type(one) is not type(third)


def test_without_a_handle_the_override_calls_through() -> None:
    """An object that has lost the attribute behaves as the plain one."""
    thing = Thing()
    swap(thing, {"__call__": doubling}, 2)
    del thing.__dict__[ATTRIBUTE]
    assert 3 == thing(2)


def test_a_class_that_cannot_be_changed_is_left_whole() -> None:
    """Where Python refuses the assignment nothing has happened."""

    class Fixed(Thing):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise TypeError(name)
            super().__setattr__(name, value)

    thing = Fixed()
    before = dict(thing.__dict__)
    with pytest.raises(TypeError):
        swap(thing, {"__call__": doubling}, 2)
    assert before == thing.__dict__
    with pytest.raises((TypeError, AttributeError)):
        swap(3.0, {"__call__": doubling}, 2)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("cls", [Thing, Slotted])
def test_copies_are_of_the_plain_class(copied: Any, cls: type) -> None:
    """Copies and pickles carry the state without our attribute; slots come along."""
    thing = cls()
    thing.value = 7
    if cls is Slotted:
        thing.extra = "x"
    swap(thing, {"__call__": doubling}, 2)
    twin = copied(thing)
    assert cls is type(twin)
    assert {"value": 7} == twin.__dict__
    assert is_swapped(thing)
    if cls is Slotted:
        assert "x" == twin.extra


def test_a_copy_of_objects_that_know_each_other_keeps_their_ties() -> None:
    """A child that holds its parent is copied with it: the copies hold each other."""
    parent, child = Thing(), Thing()
    parent.child, child.parent = child, parent
    for thing in (parent, child):
        swap(thing, {"__call__": doubling}, 2)
    for twin in (copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))):
        assert twin is twin.child.parent
        assert twin is not parent
        assert Thing is type(twin.child)


def test_a_module_with_its_own_reduce_keeps_it() -> None:
    """A class that says how it is pickled is pickled so."""

    class Own(nn.Module):
        def __reduce__(self) -> Any:
            return (_made, (5,))

    module = Own()
    swap(module, {"__call__": tripling}, 2)
    assert 5 == copy.deepcopy(module)


def _made(value: int) -> int:
    return value


@pytest.mark.parametrize("order", ["first in, first out", "first in, last out"])
def test_a_later_swap_by_somebody_else_survives(order: str) -> None:
    """Another library's subclass above ours stays when ours goes, and ours is silent below it."""
    module = nn.Linear(1, 1)
    swap(module, {"__call__": tripling}, 2)
    ours = type(module)
    theirs = type("Linear", (ours,), {})
    module.__class__ = theirs
    x = torch.ones(1, 1)
    if order == "first in, first out":
        restore(module)
        assert theirs is type(module)
        assert isinstance(module, nn.Linear)
    else:
        module.__class__ = ours
        restore(module)
        assert nn.Linear is type(module)
    assert not is_swapped(module)
    assert x.shape == module(x).shape


def test_a_parametrized_module_may_come_and_go() -> None:
    """The parametrizations of torch swap the class too: before ours or after, and undone in either order."""
    from torch.nn.utils import parametrize

    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    x = torch.ones(1, 2)
    for before in (True, False):
        module = nn.Linear(2, 2, bias=False)
        expected = 2 * module(x)
        if before:
            parametrize.register_parametrization(module, "weight", Twice())
            swap(module, {"__call__": doubling}, 1)
        else:
            swap(module, {"__call__": doubling}, 1)
            parametrize.register_parametrization(module, "weight", Twice())
        assert torch.equal(expected, module(x))
        restore(module)
        assert torch.equal(expected, module(x))
        assert not is_swapped(module)
