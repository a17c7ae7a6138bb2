"""Runs one sampling loop under cache-dit's DBCache or DBPrune and under ours, and notes which blocks were computed.

cache-dit chooses the lists of blocks by its own register of models, or takes those that a test names. Each list has a
context of its own, with its own decisions. What was computed is told by probes on the Linear layers inside each block.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")

import pytest

pytest.importorskip("cache_dit")

import cache_dit
from blocks import blocks, sample
from cache_dit import BlockAdapter, ForwardPattern, TaylorSeerCalibratorConfig
from cache_dit.caching.block_adapters import BlockAdapterRegister
from harness import Run
from torch import nn

import cachepolicy
from cachepolicy._resources import shipped_policies

STEPS = 12
TIMESTEPS = tuple(950.0 - 70 * step for step in range(STEPS))

ALWAYS = 1e9
"""A threshold above all changes."""

TWO_STREAMS = ForwardPattern.Pattern_1
"""The pattern of blocks that take hidden states and the text's, and return the text's first."""


@dataclass(frozen=True)
class Theirs:
    """A run under cache-dit, with its own records: the cached steps and the measured changes of each list."""

    run: Run
    cached: list[list[int]]
    changes: list[list[float]]


def silence() -> None:
    """Keep cache-dit from logging every model that it adapts."""
    for name in list(logging.root.manager.loggerDict):
        if name.lower().startswith(("cache_dit", "cache-dit")):
            logging.getLogger(name).disabled = True


def adapter_of(model: nn.Module) -> BlockAdapter:
    """What cache-dit's register knows of a model."""
    silence()
    adapter = BlockAdapterRegister.get_adapter(copy.deepcopy(model))
    assert adapter is not None
    return adapter


def hidden_states_alone(model: nn.Module) -> bool:
    """Whether some blocks are called with hidden states as their only stream, in cache-dit's view."""
    return any(pattern.Forward_H_only for pattern in BlockAdapter.flatten([adapter_of(model).forward_pattern]))


def lists_of(model: nn.Module) -> list[str]:
    """The names of the lists of blocks for which cache-dit decides, or an empty list for the whole chain in one."""
    adapter = adapter_of(model)
    named: Any = adapter.blocks_name
    names: list[str] = [named] if isinstance(named, str) else list(named)
    # One list that has all blocks, or several joined to one, is the chain of `blocks`.
    lists = {name.split(".")[0] for name in blocks(model)}
    whole = len(names) == 1 and (adapter.dummy_blocks_names or lists == set(names))
    return [] if whole else names


def run_theirs(
    name: str,
    model: nn.Module,
    config: Any,
    order: int = 0,
    *,
    lists: list[tuple[str, ForwardPattern]] | None = None,
    **options: Any,
) -> Theirs:
    """The loop under cache-dit, on a copy.

    Args:
        name: The entry of the zoo.
        model: The model.
        config: A `DBCacheConfig` or `DBPruneConfig`.
        order: The order of TaylorSeer; 0 reuses the residual.
        lists: The lists of blocks and their patterns; None takes those of cache-dit's register.
        options: Options of the loop.
    """
    silence()
    twin, config = copy.deepcopy(model), copy.deepcopy(config)
    config.enable_separate_cfg = options.get("guidance") == "sequential"
    watched = blocks(twin)
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    target: Any = twin
    if lists is not None:
        target = BlockAdapter(
            transformer=twin,
            blocks=[getattr(twin, each) for each, _ in lists],
            forward_pattern=[pattern for _, pattern in lists],
        )
    cache_dit.enable_cache(target, cache_config=config, calibrator_config=calibrator)
    run = sample(name, twin, options.pop("timesteps", TIMESTEPS), watched=watched, **options)
    manager: Any = twin._context_manager
    contexts = [manager.get_context(each) for each in twin._context_names]  # pyright: ignore[reportGeneralTypeIssues]
    changes = [[*context.residual_diffs.values(), *context.cfg_residual_diffs.values()] for context in contexts]
    return Theirs(run, [list(context.cached_steps) for context in contexts], changes)


def run_ours(name: str, model: nn.Module, policy: Any, params: dict[str, Any] | None = None, **options: Any) -> Run:
    """The loop under a policy, on a copy."""
    twin = copy.deepcopy(model)
    with cachepolicy.apply(twin, policy, **(params or {})):
        return sample(name, twin, options.pop("timesteps", TIMESTEPS), watched=blocks(twin), **options)


def per_list(text: str, lists: list[str]) -> str:
    """The rules of a policy once for each list of blocks, each with its own signals.

    Args:
        text: The text of a policy of rules on `blocks`.
        lists: The names of the lists.
    """
    start = re.search(r"^(signal|match)", text, re.MULTILINE)
    assert start is not None
    head, body = text[: start.start()], text[start.start() :].split("\nexpect", maxsplit=1)[0]
    signals = re.findall(r"^signal (\w+)", body, re.MULTILINE)
    copies = list[str]()
    for number, name in enumerate(lists):
        one = re.sub(r"blocks(\[[^\]]*\])?", rf'blocks\1 of "^{name}$"', body)
        for signal in signals:
            one = re.sub(rf"\b{signal}\b", f"{signal}_{number}", one)
        copies.append(one)
    return head + "\n".join(copies)


def shipped(name: str, lists: list[str]) -> str:
    """The text of a shipped policy, with its rules once for each list."""
    return per_list(shipped_policies()[name].read_text(), lists)


def params_of(config: Any, order: int = 0) -> dict[str, Any]:
    """The params of `dbcache` for a setting of cache-dit with dynamic decisions.

    From a threshold of 1 on, cache-dit reuses without measuring.
    """
    threshold = config.residual_diff_threshold
    bounds = {"streak": config.max_continuous_cached_steps, "most": config.max_cached_steps}
    mask = config.steps_computation_mask
    return {
        "first": config.Fn_compute_blocks,
        **({"end": -config.Bn_compute_blocks} if config.Bn_compute_blocks else {}),
        "threshold": ALWAYS if threshold >= 1 else threshold,
        "warmup": 0 if mask else config.max_warmup_steps,
        **{key: value for key, value in bounds.items() if value >= 0},
        "order": order,
        **({"steps_mask": "".join(map(str, mask))} if mask else {}),
    }
