"""A policy in the diffusion server of SGLang, configured by the environment variable `CACHEPOLICY_CONFIG`.

SGLang calls `register` in each of its processes, by the entry point `sglang.multimodal_gen.plugins`. A request says
what it asks for in `diffusers_kwargs={"cachepolicy": ...}`; see `docs/engines/sglang.md`.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# SGLang is installed in environments of its own only.

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from cachepolicy.errors import PolicyError
from cachepolicy.integrations.served import (
    KEY,
    Asked,
    Config,
    RequestRefusedError,
    ServedPolicies,
    joint_group,
    line_of,
)

CONFIG = "CACHEPOLICY_CONFIG"
"""The environment variable: the config as JSON text, or the path of a file with it."""

logger = logging.getLogger("sglang.multimodal_gen.cachepolicy")  # SGLang shows what is logged under its name

_STAGE = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.DenoisingStage"
_served: weakref.WeakKeyDictionary[Any, ServedPolicies] = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def register() -> None:
    """Register the hooks with SGLang, if the environment names a policy."""
    if not os.environ.get(CONFIG, "").strip():
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    for method, hook in {
        "__init__": _starting,
        "_run_denoising_loop": _drawing,
        "_maybe_get_bcg_runner": _without_graphs,
    }.items():
        HookRegistry.register(f"{_STAGE}.{method}", hook, HookType.AROUND)


def config() -> Config:
    """Return the configuration that the environment names.

    Raises:
        PolicyError: It is wrong (E309), or its file cannot be read (E152).
    """
    text = os.environ[CONFIG].strip()
    if not text.startswith("{"):
        try:
            text = Path(text).read_text("utf-8")
        except OSError as error:
            raise PolicyError.of("E152", f"`{CONFIG}` names `{text}`: {(error.strerror or '').lower()}") from error
    return Config.of(text)


class Denoisers:
    """What `cachepolicy.apply` takes for a pipeline: the denoisers of a stage."""

    def __init__(self, stage: Any) -> None:
        self.components = {
            name: model
            for name in ("transformer", "transformer_2")
            if (model := getattr(stage, name, None)) is not None
        }
        self.__dict__.update(self.components)

    def __call__(self) -> None:
        """Do nothing: the loop of the stage calls the denoisers."""


def _starting(original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the constructor of a stage: attach the policies, so that mistakes stop the server at its start."""
    result = original(stage, *args, **kwargs)
    if getattr(stage, "transformer", None) is not None:
        _policies(stage)
    return result


def _policies(stage: Any) -> ServedPolicies:
    """Return the policies of a stage. A stage that loads its models late gets them at its first request."""
    denoisers = Denoisers(stage)
    served = _served.get(stage)
    if served is None or cast("Denoisers", served.target).components != denoisers.components:
        if served is not None:
            served.stop()
        from sglang.multimodal_gen.runtime.distributed import parallel_state

        groups = [getattr(parallel_state, name, None) for name in ("_SP", "_TP")]
        served = _served[stage] = ServedPolicies(denoisers, config(), joint_group(groups))
        served.start()
        logger.info("%s on %s", served.config.default.policy, type(stage).__name__)
    return served


def _drawing(original: Callable[..., Any], stage: Any, ctx: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the denoising loop of a request: its session."""
    served = _policies(stage)
    own = [name for name in ("enable_teacache", "enable_spectrum") if getattr(batch, name, False)]
    own += ["Cache-DiT"] if getattr(stage, "_cache_dit_enabled", False) else []
    name = str(getattr(batch, "request_id", None) or "request")
    try:
        asked = served.read(_said_by(batch))
        if own and not asked.bare:
            logger.warning("the request asks for a cache of SGLang (%s), which runs without a policy", ", ".join(own))
            asked = Asked(bare=True)
        result, record = served.serve(
            asked,
            f"{name} {next(_numbers)}",
            lambda: original(stage, ctx, batch, *args, **kwargs),
            options={"scheduler": ctx.scheduler},
        )
    except RequestRefusedError as error:
        raise ValueError(f"cachepolicy: {error}") from error
    logger.info("%s", line_of(record))
    batch.extra[KEY] = record
    return result


def _said_by(batch: Any) -> Any:
    given: Any = getattr(batch, "extra", None)
    kwargs: Any = cast("Mapping[str, Any]", given).get("diffusers_kwargs") if isinstance(given, Mapping) else None
    return cast("Mapping[str, Any]", kwargs).get(KEY) if isinstance(kwargs, Mapping) else None


def _without_graphs(original: Callable[..., Any], stage: Any, current_model: Any) -> Any:
    """Around the choice of a CUDA graph: a graph would repeat the decisions of the step in which it was recorded."""
    return None if stage in _served else original(stage, current_model)
