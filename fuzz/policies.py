"""What must hold of every policy that was accepted, wherever it came from."""

from __future__ import annotations

import cachepolicy
from cachepolicy.errors import PolicyError
from cachepolicy.planning.check import check

STEPS = 3


def sound(policy: cachepolicy.Policy) -> None:
    """A policy that was accepted can be printed and read back as text and as JSON, and be judged and simulated.

    Raises:
        AssertionError: a round trip lost something.
    """
    text = cachepolicy.format(policy)
    read = cachepolicy.parse(text)
    assert policy == read, text
    assert text == cachepolicy.format(read), text
    assert hash(policy) == hash(read), text
    form = policy.model_dump_json()
    assert policy == cachepolicy.Policy.model_validate_json(form), form
    check(policy)
    refuses(policy)


def refuses(policy: cachepolicy.Policy) -> None:
    """A simulation gives a schedule, or says why it cannot."""
    try:
        cachepolicy.simulate(policy, steps=STEPS)
    except PolicyError as error:
        told(error)


def told(error: PolicyError) -> None:
    """An error can be shown, and says something."""
    assert error.diagnostics
    assert str(error)
