"""The JSON form on any bytes: a policy or a `PolicyError`, and an accepted policy is one that a text could say."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cachepolicy
from cachepolicy.errors import PolicyError
from fuzz.policies import sound, told

SUFFIX = "json"
SMALL = Path(__file__).parents[1] / "tests" / "fuzz" / "json_form"
"""Inputs that once went wrong, made small; seeds too."""


def hold(data: bytes) -> None:
    """Nothing but `PolicyError` comes out of any file, and every accepted policy is sound.

    Raises:
        AssertionError: what must hold does not.
    """
    handle, name = tempfile.mkstemp(".json")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        policy = cachepolicy.load(Path(name))
    except PolicyError as error:
        told(error)
    else:
        sound(policy)
    finally:
        Path(name).unlink()


# --- mutation --------------------------------------------------------------------------------------------


def mutate(data: bytes, seed: int) -> bytes | None:
    """`data` with one place of its tree changed, None where it is no JSON: bytes alone seldom stay one."""
    dice = random.Random(seed)
    try:
        tree = json.loads(data)
        places = list(_places(tree))
        if not places:
            return None
        parent, key = dice.choice(places)
        _change(dice, parent, key, [holder[at] for holder, at in places])
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return None


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree, as what holds it and the key there."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in list(keys):
        yield tree, key
        yield from _places(tree[key])


def _change(dice: random.Random, parent: Any, key: Any, values: list[Any]) -> None:
    """Put another value there, most often one from elsewhere in the same tree; or leave it out, or say it twice."""
    match dice.randrange(6):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(key, parent[key])
        case 2 | 3:
            # A copy, since a tree that holds itself is no JSON.
            parent[key] = json.loads(json.dumps(dice.choice(values)))
        case 4 if isinstance(parent[key], dict | list):
            parent[key] = [parent[key]] if isinstance(parent, list) else {"kind": "negative", "operand": parent[key]}
        case _:
            parent[key] = dice.choice(_ODD)


_ODD = (
    None, True, False, 0, 1, -1, 0.5, -0.0, 1e308, 2**53, 2**53 + 1, 10**40, "", "inf", "-inf", "nan", "Infinity", "t",
    "step", "model", "a\nb", "\u202e", "(", "x" * 2000, [], {}, "match", "number", "off", "1", "C", "CR", "not", "ü",
)  # fmt: skip
