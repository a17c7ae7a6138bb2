"""Policies of the trained routers of Learning-to-Cache for DiT (arXiv:2406.01733)."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cachepolicy.errors import PolicyError
from cachepolicy.methods.settings import Conversion, Fields, using

SUFFIXES = frozenset({".pt", ".pth", ".safetensors"})
"""Suffixes of files with tensors."""

_LIMIT = 64 * 2**20
"""Bytes of a file that are read at most."""


def is_setting(values: Mapping[str, Any]) -> bool:
    """Returns whether a mapping names a file of routers."""
    path = values.get("path")
    return isinstance(path, str | os.PathLike) and Path(cast("str", path)).suffix in SUFFIXES


def of_routers(values: Mapping[str, Any]) -> Conversion:
    """Returns the policy of a file of routers, and of the threshold `thres` that the authors' programs take.

    The routers have a score for the attention and one for the feed-forward of each block, by the number of the step
    from the end. At every other step, the second one first, a module with a score up to the threshold is reused.

    Raises:
        PolicyError: The file cannot be read (E152, E153), or has no such routers (E169).
    """
    setting = Fields("the routers' setting", values)
    path = Path(setting.get("path"))
    threshold = setting.number("thres", 0.1, low=0, high=1)
    setting.finish()
    routers = _scores(path)
    steps, width = len(routers), len(routers[0])
    computed = [
        [left % 2 == 1 or step == 0 or score > threshold for score in routers[left]]
        for step, left in enumerate(range(steps - 1, -1, -1))
    ]
    masks = ["".join("1" if row[place] else "0" for row in computed) for place in range(width)]
    given = {"attention_masks": masks[::2], "feedforward_masks": masks[1::2]}
    note = f"The routers are for {steps} steps and {width // 2} blocks; the threshold is {threshold:g}."
    return Conversion(using("l2c", given), (note,), steps)


def _scores(path: Path) -> list[list[float]]:
    """Returns the scores of all routers, from the one of the last step on."""
    tensors = _tensors(path)
    # A router of U-ViT, which is for the steps of another solver, is not in an entry of this name.
    inner: Any = tensors if path.suffix == ".safetensors" else tensors.get("routers")
    named = cast("Mapping[Any, Any]", inner) if isinstance(inner, Mapping) else dict[Any, Any]()
    found: dict[int, list[float]] = {}
    for name, tensor in named.items():
        number, _, rest = str(name).removeprefix("routers.").partition(".")
        tolist = getattr(tensor, "tolist", None)
        if rest == "prob" and number.isascii() and number.isdigit() and callable(tolist):
            found[int(number)] = [_sigmoid(float(value)) for value in cast("list[float]", tolist())]
    widths = {len(scores) for scores in found.values()}
    if sorted(found) != list(range(len(found))) or len(widths) != 1 or widths.pop() % 2:
        raise PolicyError.of(
            "E169",
            f"`{path}` has no routers of Learning-to-Cache",
            help="those of DiT are `0.prob` on, in the entry `routers`",
        )
    return [found[number] for number in range(len(found))]


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _tensors(path: Path) -> Mapping[str, Any]:
    """Returns the tensors of a file. Nothing in it is executed: of its objects, tensors and options alone are made."""
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the name
        raise PolicyError.of("E152", f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if size > _LIMIT:
        raise PolicyError.of("E153", f"`{path}` has more than {_LIMIT} bytes")
    try:
        if path.suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        torch = importlib.import_module("torch")
        # The authors' files hold the options of their training.
        allowed = getattr(torch.serialization, "safe_globals", None)
        with allowed([argparse.Namespace]) if allowed is not None else contextlib.nullcontext():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise PolicyError.of("E169", f"reading `{path}` needs the package `{error.name}`") from error
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PolicyError.of("E169", f"`{path}` holds no tensors that are safe to load: {reason}") from error
    return cast("Mapping[str, Any]", loaded) if isinstance(loaded, Mapping) else {}
