"""The digests of policies that exist: `tests/data/digests.json` holds what they are, by the name of the file.

`python -m tests.support.digests` adds the policies that are new. A digest that is there must never change.
"""

from __future__ import annotations

import json
from pathlib import Path

from cachepolicy.errors import PolicyError
from cachepolicy.language.linker import load, resolve
from tests.support import examples

ROOT = Path(__file__).parents[2]
PINNED = ROOT / "tests" / "data" / "digests.json"


def pinned() -> dict[str, str]:
    """The digests that are known."""
    return json.loads(PINNED.read_text("utf-8")) if PINNED.exists() else {}


def current() -> dict[str, str]:
    """The digests of the shipped policies and of the examples of the language that can be resolved."""
    found = dict[str, str]()
    for path in sorted([*(ROOT / "policies").glob("*.cp"), *examples.FOLDER.glob("*.cp")]):
        try:
            found[str(path.relative_to(ROOT))] = resolve(load(path)).digest
        except PolicyError:
            continue
    return found


if __name__ == "__main__":
    PINNED.write_text(json.dumps(current() | pinned(), indent=1) + "\n", "utf-8")
