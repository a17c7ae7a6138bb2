"""A policy as a cache backend of vLLM-Omni: `--cache-backend cachepolicy --cache-config '{"policy": "fbc"}'`.

vLLM-Omni calls `register` in each of its processes, by the entry point `vllm_omni.general_plugins`. A request asks for
other params, or for the bare model, in its `extra_args`; see `docs/engines/vllm-omni.md`.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false
# vLLM-Omni is installed in environments of its own only.

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from cachepolicy.errors import PolicyError
from cachepolicy.integrations.served import (
    KEY,
    Asked,
    Config,
    RequestRefusedError,
    ServedPolicies,
    alike,
    identity_of,
    joint_group,
    line_of,
)

logger = logging.getLogger("vllm_omni.cachepolicy")  # vLLM-Omni shows what is logged under its name

BACKEND = "cachepolicy"
"""The name of the backend in `--cache-backend`."""

_SELECTOR = "vllm_omni.diffusion.cache.selector"
_RUNNER = "vllm_omni.diffusion.worker.diffusion_model_runner"
_ENGINE = "vllm_omni.diffusion.diffusion_engine"
_FORMATTER = "vllm_omni.diffusion.output_formatter"
_SCHEDULER = "vllm_omni.diffusion.sched.request_scheduler"
_MARK = "cachepolicy_wrapped"


def register() -> None:
    """Make the backend known to vLLM-Omni. More than one call has the effect of one."""
    _rebind(_SELECTOR, "get_cache_backend", _selecting, users=(_RUNNER,))
    # Without these two, requests that disagree are split in the worker, and their records are in its log only.
    for module, name, wrapper, users in (
        (_SCHEDULER, "build_request_batch_sampling_params_key", _separating, ()),
        (_FORMATTER, "format_diffusion_outputs", _reporting, (_ENGINE,)),
    ):
        try:
            _rebind(module, name, wrapper, users=users)
        except (ImportError, AttributeError) as error:
            logger.warning("vLLM-Omni has no %s.%s: %s", module, name, error)


def _rebind(module: str, name: str, wrapper: Callable[[Any], Any], users: Sequence[str]) -> None:
    """Replace a function in its module, and in the modules that have imported it by name."""
    home = importlib.import_module(module)
    original = getattr(home, name)
    if getattr(original, _MARK, False):
        return
    wrapped = wrapper(original)
    setattr(wrapped, _MARK, True)
    setattr(home, name, wrapped)
    for user in users:
        if getattr(sys.modules.get(user), name, None) is original:
            setattr(sys.modules[user], name, wrapped)


def _selecting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_cache_backend(cache_backend: str | None, cache_config: Any) -> Any:
        return _backend()(cache_config) if cache_backend == BACKEND else original(cache_backend, cache_config)

    return get_cache_backend


def _separating(original: Callable[..., Any]) -> Callable[..., Any]:
    """Let the scheduler form batches of requests that ask for the same."""

    @functools.wraps(original)
    def build_request_batch_sampling_params_key(request: Any) -> Any:
        key = original(request)
        said = _said_by(request.sampling_params)
        if said is None:
            return key
        return replace(key, condition_key=(key.condition_key, KEY, identity_of(said)))

    return build_request_batch_sampling_params_key


def _said_by(sampling_params: Any) -> Any:
    """Return what the extra arguments of a request say under `cachepolicy`, or None."""
    extra: Any = getattr(sampling_params, "extra_args", None)
    return cast("Mapping[str, Any]", extra).get(KEY) if isinstance(extra, Mapping) else None


def _reporting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Hand the record of a request to the caller, as `custom_output["cachepolicy"]` of its outputs."""

    @functools.wraps(original)
    def format_diffusion_outputs(*args: Any, **kwargs: Any) -> Any:
        formatted = original(*args, **kwargs)
        record = getattr(kwargs.get("diffusion_output"), KEY, None)
        if record is not None:
            for output in formatted:
                output.custom_output = {**(output.custom_output or {}), KEY: record}
        return formatted

    return format_diffusion_outputs


# --- the pipeline ----------------------------------------------------------------------------------------


class Denoisers:
    """What `cachepolicy.apply` takes for a pipeline: the denoisers, the scheduler, and the call that is one request.

    vLLM-Omni's pipelines are modules, and `apply` would take such a pipeline for one denoiser.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._forward = pipeline.forward
        self._paths = _denoiser_paths(pipeline)
        for denoiser in self.components.values():
            unpack(denoiser)

    @property
    def components(self) -> dict[str, Any]:
        """The denoisers by the names of `cachepolicy.apply`."""
        return {name: _reached(self._pipeline, path) for name, path in self._paths.items()}

    @property
    def scheduler(self) -> Any:
        """The scheduler of the request. Wan makes a new one inside a request."""
        return getattr(self._pipeline, "scheduler", None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._paths:
            raise AttributeError(name)
        return _reached(self._pipeline, self._paths[name])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Draw, as the pipeline's own `forward`."""
        return self._forward(*args, **kwargs)


_UNPACKED = {"vllm_omni.diffusion.models.sd3.sd3_transformer.SD3Transformer2DModel": "context_embedder"}
"""Layers by class of denoiser that return a tensor and None, which the first block takes apart.

A span of blocks has to find the stream among the arguments of its first block.
"""


def unpack(denoiser: Any) -> None:
    """Let a denoiser hand its first block the stream itself, where it hands over a pair. No result changes."""
    layer = _UNPACKED.get(f"{type(denoiser).__module__}.{type(denoiser).__qualname__}")
    if layer is not None:
        getattr(denoiser, layer).register_forward_hook(_first_of)


def _first_of(layer: Any, args: Any, output: Any) -> Any:  # noqa: ARG001 (a forward hook of torch)
    return output[0] if isinstance(output, tuple) else output


_NAMES = ("transformer", "transformer_2", "transformer_3", "unet", "dit")


def _reached(pipeline: Any, path: str) -> Any:
    return functools.reduce(lambda module, name: getattr(module, name, None), path.split("."), pipeline)


def _denoiser_paths(pipeline: Any) -> dict[str, str]:
    """Return the paths of the denoisers in a pipeline, by names that `cachepolicy.apply` knows.

    Raises:
        PolicyError: The pipeline has none (E300).
    """
    stated = list(getattr(pipeline, "_dit_modules", None) or _NAMES)
    found = {path: module for path in stated if (module := _reached(pipeline, path)) is not None}
    # Of a model and a part of it, the model is called.
    outer = [
        path
        for path, module in found.items()
        if not any(module is not other and any(module is part for part in other.modules()) for other in found.values())
    ]
    if not outer:
        raise PolicyError.of(
            "E300",
            f"`{type(pipeline).__name__}` has no denoiser",
            help=f"`_dit_modules` of the pipeline names it; looked for {', '.join(map(str, stated))}",
        )
    free = iter([name for name in _NAMES if name not in outer])
    return {path if path in _NAMES else next(free): path for path in outer}


def _deciding_together() -> Any:
    """Return the group of the processes that hold parts of the same sample, or None if there is one process."""
    from vllm.distributed import parallel_state as weights
    from vllm_omni.diffusion.distributed import parallel_state as tokens

    return joint_group([getattr(tokens, "_SP", None), getattr(weights, "_TP", None)])


# --- the backend -----------------------------------------------------------------------------------------


class Requests:
    """The `forward` of a pipeline under the policies of a server: each request is a session.

    Args:
        pipeline: The pipeline of vLLM-Omni.
        config: The configuration of the server.
    """

    def __init__(self, pipeline: Any, config: Config) -> None:
        self.denoisers = Denoisers(pipeline)
        self.served = ServedPolicies(self.denoisers, config, _deciding_together())
        self.served.start()
        self._numbers = itertools.count()

    def __call__(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Serve a batch of requests; what the runner calls as `pipeline.forward`."""
        params = getattr(batch, "sampling_params_list", None)
        call = functools.partial(self._draw, args, kwargs)
        if params is None:  # not called by the runner
            return self._serve(Asked(), batch, f"call {next(self._numbers)}", 1, call)[0]
        if batch.is_dummy_run():  # a policy that cannot follow the model must not let the server start
            return self._serve(Asked(), batch, batch.request_id, len(params), call)[0]
        asked, refused = self._read(params)
        groups = list(alike(asked))
        if len(groups) == 1 and not refused:
            return self._answered(groups[0][0], batch, list(batch.request_ids), call)
        return self._split(batch, groups, refused, call)

    def _draw(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: Any) -> Any:
        return self.denoisers(batch, *args, **kwargs)

    def _read(self, params: Sequence[Any]) -> tuple[list[Asked | None], dict[int, str]]:
        asked, refused = list[Asked | None](), dict[int, str]()
        for index, each in enumerate(params):
            try:
                asked.append(self.served.read(_said_by(each)))
            except RequestRefusedError as error:
                asked.append(None)
                refused[index] = str(error)
        return asked, refused

    def _serve(self, asked: Asked, batch: Any, key: str, requests: int, call: Any) -> tuple[Any, dict[str, Any]]:
        params = getattr(batch, "sampling_params_list", None)
        steps = params[0].num_inference_steps if params else None  # requests of a batch have the same number
        options = {"steps": steps} if steps and self.denoisers.scheduler is None else {}
        result, record = self.served.serve(
            asked, key, functools.partial(call, batch), requests=requests, options=options
        )
        logger.info("%s", line_of(record))
        return result, record

    def _answered(self, asked: Asked, batch: Any, ids: list[str], call: Any) -> Any:
        """Return the outputs of requests that ask for the same, or a refusal for each of them."""
        try:
            result, record = self._serve(asked, batch, "+".join(ids), len(ids), call)
        except RequestRefusedError as error:
            return [_refusal(str(error), request) for request in ids]
        for output in _listed(result):
            setattr(output, KEY, record)
        return result

    def _split(
        self, batch: Any, groups: Sequence[tuple[Asked, list[int]]], refused: Mapping[int, str], call: Any
    ) -> list[Any]:
        """Return the outputs of a batch whose requests ask for different things, or some of which are refused."""
        ids = list(batch.request_ids)
        outputs: list[Any] = [None] * len(ids)
        for index, message in refused.items():
            outputs[index] = _refusal(message, ids[index])
        if groups and (reason := _inseparable(batch)):
            self.served.counts["computed_together"] += 1
            logger.warning(
                "%s: %d requests ask for different things, and %s: all compute", "+".join(ids), len(ids), reason
            )
            kept = _listed(self._answered(Asked(bare=True), batch, ids, call))
            return [kept[index] if output is None else output for index, output in enumerate(outputs)]
        if len(groups) > 1:
            self.served.counts["split"] += 1
            logger.info(
                "%s: split into %d calls, since the requests ask for different things", "+".join(ids), len(groups)
            )
        for asked, members in groups:
            part = replace(batch, requests=[batch.requests[index] for index in members])
            result = self._answered(asked, part, [ids[index] for index in members], call)
            for index, output in zip(members, _listed(result), strict=True):
                outputs[index] = output
        return outputs


def _listed(result: Any) -> list[Any]:
    """Return the outputs of a pipeline as a list. It returns one output for one request, or a list."""
    return result if isinstance(result, list) else [result]


def _inseparable(batch: Any) -> str:
    """Return why a batch cannot be served in parts, or an empty text."""
    if len(batch.request_ids) < 2:
        return ""
    from vllm_omni.diffusion import forward_context

    try:
        paged = getattr(forward_context.get_forward_context(), "paged_kv_runtime", None) is not None
    except AssertionError:  # outside a forward
        paged = False
    return "their keys and values are paged together" if paged else ""


def _refusal(message: str, request: str) -> Any:
    """Return the output of a request that is refused, for which the server answers 400."""
    from vllm_omni.diffusion.data import DiffusionOutput

    logger.warning("%s: refused: %s", request, message)
    return DiffusionOutput(error=f"cachepolicy: {message}", error_status_code=400, error_type="BadRequestError")


@functools.cache
def _backend() -> Any:
    from vllm_omni.diffusion.cache.base import CacheBackend

    class CachePolicyBackend(CacheBackend):
        """The cache backend that the runner of vLLM-Omni creates.

        Raises:
            PolicyError: The configuration is wrong (E309).
        """

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.settings = Config.of(_content(config))
            self.requests: Requests | None = None

        def enable(self, pipeline: Any) -> None:
            """Attach the policies, when the pipeline has been loaded and compiled."""
            self.requests = Requests(pipeline, self.settings)
            pipeline.forward = self.requests  # the runner calls `forward`, not the module
            self.enabled = True
            sites = sum(len(plan.sites) for plan in self.requests.served.run.plans.values())
            logger.info("%s on %s: %d sites", self.settings.default.policy, type(pipeline).__name__, sites)

        def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
            """Do nothing: each request is a session of its own."""

    return CachePolicyBackend


def _content(config: Any) -> Any:
    """Return what the user wrote. vLLM-Omni keeps the keys that it does not know apart."""
    extra = getattr(config, "_extra_params", None)
    return config if isinstance(config, Mapping | str) or extra is None else cast("Mapping[str, Any]", extra)
