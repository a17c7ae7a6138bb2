"""Modules that stand in for those of a package that is not installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any

import pytest


def install(patch: pytest.MonkeyPatch, members: Mapping[str, Mapping[str, Any]]) -> None:
    """Let modules with these members, and the packages around them, be what an import finds, until the patch is undone.

    Args:
        patch: Undoes the installation.
        members: The members of each module, by its dotted name.
    """
    made = dict[str, types.ModuleType]()
    for path, content in members.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            if name not in made:
                made[name] = types.ModuleType(name)
                patch.setitem(sys.modules, name, made[name])
                if length > 1:
                    setattr(made[".".join(parts[: length - 1])], parts[length - 1], made[name])
        vars(made[path]).update(content)
