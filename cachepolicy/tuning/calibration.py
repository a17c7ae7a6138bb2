# diffusers comes without complete types.
# pyright: basic
"""`calibrate`: the constants of MagCache, TeaCache and SmoothCache for a model, from uncached runs, as policies."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from cachepolicy.engine.block_chain import bind_names
from cachepolicy.engine.history_packing import leaves
from cachepolicy.engine.hooks import parameters_of
from cachepolicy.engine.introspection import describe, unwrapped
from cachepolicy.errors import PolicyError
from cachepolicy.language.formatter import format as format_policy
from cachepolicy.language.formatter import format_node
from cachepolicy.language.ir import OfKind
from cachepolicy.language.parser import parse
from cachepolicy.planning.selectors import select
from cachepolicy.tools.sampling import Progress
from cachepolicy.tuning.found_policy import FoundPolicy
from cachepolicy.tuning.provenance import Circumstances, observed, tuned_statement
from cachepolicy.tuning.recording import OutputRecord, record
from cachepolicy.tuning.sampling import ModelCall, SampleFunction, Sampler

Method = Literal["magcache", "teacache", "smoothcache"]
METHODS: tuple[Method, ...] = get_args(Method)
DEGREE = 4
"""Degree of TeaCache's polynomial."""
REACH = 3
"""Most steps after a compute for which SmoothCache measures and allows a reuse."""
STREAK = 5
"""Most reuses in a row of MagCache, as in its settings for FLUX."""
RETENTION = 0.1
"""Share of the steps at the start that MagCache computes, as in its settings for FLUX."""
_COMPONENTS = ("self_attention", "cross_attention", "feedforward")


@dataclass(frozen=True, slots=True)
class Calibration(FoundPolicy):
    """A calibrated method.

    Args:
        policy: The policy with its constants.
        text: Its text.
        method: The method.
        threshold: The value of its threshold.
        cost: The share of the steps that are computed, by the recording: of the blocks, or of the modules that may be
            reused, in equal parts for each kind.
    """

    method: Method
    threshold: float
    cost: float


def calibrate(
    target: Any,
    calls: Sequence[ModelCall],
    method: Method,
    *,
    cost: float = 0.5,
    sample: SampleFunction | None = None,
    scheduler: Any = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure the constants of a published method for a model, and write them as a policy.

    MagCache: the ratio of the magnitudes of the blocks' residuals at one step and the step before, as a mean over
    tokens, for each step. TeaCache: a polynomial from the relative change of the first block's modulated input to that
    of the blocks' output. SmoothCache: for each kind of module, the relative error of its outputs when they are reused
    for some steps, and from it a list of steps.

    Args:
        target: A diffusers pipeline without a policy, or a denoiser.
        calls: Keyword arguments of each call, with as many steps. MagCache needs one, the others some.
        method: `"magcache"`, `"teacache"` or `"smoothcache"`.
        cost: The threshold is chosen so that at most this share of the steps is computed, 0 to 1, by the recording.
        sample: Samples once from the arguments of a call, see `tune`. Required for a denoiser.
        scheduler: The scheduler that `sample` steps. Required for a denoiser.
        progress: Called with the calls done, the calls in all, and what is sampled.

    Returns:
        The policy.

    Raises:
        PolicyError: The method is unknown or the model has not what it measures (E407), or the calls cannot be
            recorded (E400, E401, E403).
    """
    if method not in METHODS:
        raise PolicyError.of(
            "E407", f"there is no method `{method}`", help=f"one of {', '.join(f'`{name}`' for name in METHODS)}"
        )
    sampler = Sampler(target, sample, scheduler)
    series, runs = list[_Series](), list[tuple[OutputRecord, Circumstances]]()
    for number, call in enumerate(calls):
        with observed(sampler, call) as seen:
            measured, recorded = _recorded(sampler, call, method)
        series.append(measured)
        runs.append((recorded, seen))
        if progress is not None:
            progress(number + 1, len(calls), "recording")
    if len({one.steps for one in series}) != 1:
        raise PolicyError.of(
            "E403",
            "the calls differ in their number of steps" if series else "there is no call to record",
            help="pass calls with the same `num_inference_steps`",
        )
    made = {"magcache": _magcache, "teacache": _teacache, "smoothcache": _smoothcache}[method](series, cost)
    tuned = tuned_statement(
        runs[0][0],
        sampler.models,
        runs[0][1],
        {"method": method, "threshold": made.threshold, "cost": made.cost, "samples": len(calls)},
    )
    text = format_policy(parse(f"{made.text}\n{format_node(tuned)}\n"))
    return Calibration(parse(text, source="<calibrated>"), text, method, made.threshold, made.cost)


# --- the recording ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Series:
    """What was measured of one run: values by guidance branch and step, and of SmoothCache by kind and distance.

    Args:
        steps: The number of steps.
        probe: TeaCache's probe, as the language writes it.
        moved: Relative change of the probe.
        changed: Relative change of the blocks' output.
        ratios: Ratio of the magnitudes of the blocks' residuals.
        errors: Relative errors of outputs that are reused a distance later, by kind, distance and the step of the
            compute: one for each module and branch.
    """

    steps: int = 0
    probe: str = ""
    moved: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    changed: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    ratios: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float])
    errors: dict[tuple[str, int, int], list[float]] = field(
        default_factory=lambda: defaultdict[tuple[str, int, int], list[float]](list)
    )


def _recorded(sampler: Sampler, call: ModelCall, method: Method) -> tuple[_Series, OutputRecord]:
    """Sample a call uncached and measure what the method needs."""
    series = _Series()
    watched = [_Watch(unwrapped(model), series, method) for model in sampler.models]

    def step() -> None:
        series.steps += 1
        for watch in watched:
            watch.branch = 0

    with contextlib.ExitStack() as stack:
        for watch in watched:
            stack.enter_context(watch.hooked())
        records = record(lambda: sampler(call), sampler.schedulers, sampler.models, step)
    return series, records[0]


class _Watch:
    """Measures one denoiser. Each of its calls within a step is a guidance branch."""

    def __init__(self, model: nn.Module, series: _Series, method: Method) -> None:
        self.branch = 0
        self._model = model
        self._series = series
        self._method = method
        self._now = dict[str, torch.Tensor]()
        self._before = dict[tuple[str, int], torch.Tensor]()
        self._outputs = dict[tuple[str, int], list[torch.Tensor]]()
        self._skeleton = describe(model)
        blocks = [name for each in self._skeleton.block_lists for name in self._skeleton.elements[each]]
        if not blocks and method != "smoothcache":
            raise PolicyError.of(
                "E407",
                f"`{method}` reuses the blocks of a model, and `{type(model).__name__}` has none",
                help="`smoothcache` calibrates attention and feed-forward modules",
            )
        self._blocks = blocks

    @contextlib.contextmanager
    def hooked(self) -> Generator[None]:
        """Measure the calls inside the `with` block."""
        with contextlib.ExitStack() as stack:
            if self._method == "smoothcache":
                self._hook_components(stack)
            else:
                self._hook_blocks(stack)
            stack.callback(self._model.register_forward_hook(self._called).remove)
            yield

    # --- SmoothCache

    def _hook_components(self, stack: contextlib.ExitStack) -> None:
        found = False
        for kind in _COMPONENTS:
            for modules in select(OfKind(of=kind), self._skeleton):
                found = True
                hook = self._component(kind, modules[0])
                stack.callback(self._model.get_submodule(modules[0]).register_forward_hook(hook).remove)
        if not found:
            raise PolicyError.of(
                "E407", f"`{type(self._model).__name__}` has neither attention nor feed-forward modules"
            )

    def _component(self, kind: str, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            now, step = _tensor(output), self._series.steps
            earlier = self._outputs.setdefault((name, self.branch), [])
            for distance, before in enumerate(reversed(earlier), 1):
                if before.shape == now.shape:
                    error = _mean(now - before) / max(_mean(now), 1e-12)
                    self._series.errors[kind, distance, step - distance].append(error)
            earlier.append(now)
            del earlier[:-REACH]

        return hook

    # --- MagCache and TeaCache

    def _hook_blocks(self, stack: contextlib.ExitStack) -> None:
        first = self._model.get_submodule(self._blocks[0])
        last = self._model.get_submodule(self._blocks[-1])
        parameters = parameters_of(first)
        probe, argument, normed = _probe(first, self._blocks[0], parameters)
        self._series.probe = probe

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            named = bind_names(parameters, args, kwargs)
            self._now["input"] = next(value for value in named.values() if isinstance(value, torch.Tensor)).detach()
            if normed is None:
                self._now["probe"] = self._now["input"] if argument is None else _tensor(named[argument])

        def probed(_: nn.Module, __: Any, output: Any) -> None:
            self._now["probe"] = _tensor(output)

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            self._now["output"] = _like(output, self._now["input"])

        stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(last.register_forward_hook(leave).remove)
        if normed is not None:
            stack.callback(normed.register_forward_hook(probed).remove)

    def _called(self, *_: Any) -> None:
        """Compare a call of the model with that of the step before, on the same branch."""
        now, series, key = self._now, self._series, (self.branch, self._series.steps)
        if "output" in now:
            now["residual"] = (
                now["output"] - now["input"] if now["output"].shape == now["input"].shape else now["output"]
            )
            before = {name: self._before.get((name, self.branch)) for name in now}
            probe, output, residual = before.get("probe"), before.get("output"), before.get("residual")
            if probe is not None and probe.shape == now["probe"].shape:
                series.moved[key] = _mean(now["probe"] - probe) / max(_mean(probe), 1e-12)
            if output is not None and residual is not None and output.shape == now["output"].shape:
                series.changed[key] = _mean(now["output"] - output) / max(_mean(output), 1e-12)
                # Channels are behind the tokens, or before height and width.
                channels = -1 if residual.ndim == 3 else 1
                lengths = [tensor.double().norm(dim=channels) for tensor in (residual, now["residual"])]
                series.ratios[key] = float((lengths[1] / lengths[0].clamp(min=1e-12)).mean())
            self._before |= {(name, self.branch): tensor for name, tensor in now.items()}
            self._now = {}
        self.branch += 1


def _probe(first: nn.Module, name: str, parameters: Sequence[str]) -> tuple[str, str | None, nn.Module | None]:
    """Return the probe of TeaCache in the language, and the argument or the module that it reads.

    It is the modulated input of the first block where a module gives it, else the embedding of the timestep, else the
    input of the block.
    """
    norm = dict(first.named_children()).get("norm1")
    if norm is not None and "Ada" in type(norm).__name__:
        pattern = f"{name}.norm1".replace(".", "\\.")
        return f'output("^{pattern}$")', None, norm
    if "temb" in parameters:
        return 'argument(blocks[0], "temb")', "temb", None
    return "input(blocks[0])", None, None


def _tensor(output: Any) -> torch.Tensor:
    tensors = leaves(output)
    if not tensors:
        raise PolicyError.of("E407", f"a module returned `{type(output).__name__}`, which holds no tensor")
    # Models may write into their tensors afterwards.
    return tensors[0].detach().clone()


def _like(output: Any, stream: torch.Tensor) -> torch.Tensor:
    """Return the tensor of an output that continues a stream: the last one of its shape, else the first one."""
    same = [part for part in leaves(output) if part.shape == stream.shape]
    if same:
        return same[-1].detach().clone()
    found = _tensor(output)
    # Some models put text and picture into one sequence, the text first.
    fits = found.ndim == stream.ndim == 3 and found.shape[1] > stream.shape[1] and found.shape[2] == stream.shape[2]
    return found[:, -stream.shape[1] :] if fits else found


def _mean(tensor: torch.Tensor) -> float:
    return float(tensor.float().abs().mean())


# --- the methods -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Made:
    text: str
    threshold: float
    cost: float


def _means(values: Sequence[Mapping[tuple[int, int], float]], steps: int, missing: float) -> list[float]:
    """Return the means over runs and branches by step."""
    by_step = defaultdict[int, list[float]](list)
    for one in values:
        for (_, step), value in one.items():
            by_step[step].append(value)
    return [math.fsum(by_step[step]) / len(by_step[step]) if by_step[step] else missing for step in range(steps)]


def _chosen(share: Callable[[float], float], candidates: Iterable[float], cost: float) -> float:
    """Return the least threshold with which at most the share `cost` is computed, or that with the least share.

    The share need not fall with the threshold, so each candidate is tried.
    """
    shares = [(share(threshold), threshold) for threshold in sorted(candidates)]
    return next((threshold for found, threshold in shares if found <= cost), min(shares)[1])


def _grid(largest: float) -> list[float]:
    """Return thresholds of four digits up to the largest that can matter."""
    return [0.0, *(float(f"{value:.4g}") for value in np.geomspace(largest / 1000, largest, 400))]


def _row(computed: Sequence[bool]) -> str:
    return " ".join("C" if one else "R" for one in computed)


def _list(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def _magcache(series: Sequence[_Series], cost: float) -> _Made:
    steps = series[0].steps
    ratios = [float(f"{value:.6g}") for value in _means([one.ratios for one in series], steps, 1.0)]

    def computed(threshold: float) -> list[bool]:
        row, product, error, streak = list[bool](), 1.0, 0.0, 0
        for step, ratio in enumerate(ratios):
            owned = step >= RETENTION * steps
            if owned:
                product, streak = product * ratio, streak + 1
                error += abs(1 - product)
            row.append(not (owned and step and error <= threshold and streak <= STREAK))
            if row[-1]:
                product, error, streak = 1.0, 0.0, 0
        return row

    largest = STREAK * max(abs(1 - ratio) for ratio in ratios) * STREAK + 1e-3
    threshold = _chosen(lambda value: sum(computed(value)) / steps, _grid(largest), cost)
    row = computed(threshold)
    return _Made(
        f"""\
policy magcache "MagCache, calibrated"
source "arXiv:2506.09045"
param threshold: float = {threshold!r} in [0, inf) "largest accumulated error that still reuses"
param streak: int = {STREAK} in [0, inf) "most reuses in a row"
param retention: float = {RETENTION} in [0, 1] "share of the steps at the start that compute"
table ratios = {_list(ratios)}
match blocks when step >= retention * steps while sum(abs(1 - product(ratios[step]))) <= threshold
  at most streak in a row -> reuse residual
expect blocks over {steps} steps: {_row(row)}
""",
        threshold,
        sum(row) / steps,
    )


def _teacache(series: Sequence[_Series], cost: float) -> _Made:
    steps = series[0].steps
    pairs = [(one.moved[key], one.changed[key]) for one in series for key in one.moved.keys() & one.changed.keys()]
    moved, changed = np.array(sorted(pairs)).T if pairs else (np.zeros(0), np.zeros(0))
    degree = min(DEGREE, len(set(moved.tolist())) - 1)
    if degree < 1:
        raise PolicyError.of(
            "E407",
            "the probe of `teacache` does not change, or there are fewer than three steps",
            help="use more steps",
        )
    coefficients = [float(f"{value:.6g}") for value in np.polyfit(moved, changed, degree)]
    # One sequence for each run and branch.
    sequences = [
        [one.moved.get((branch, step), 0.0) for step in range(steps)]
        for one in series
        for branch in sorted({branch for branch, _ in one.moved})
    ]
    changes = [[float(np.polyval(coefficients, value)) for value in sequence] for sequence in sequences]

    def computed(changes: Sequence[float], threshold: float) -> list[bool]:
        row, total = list[bool](), 0.0
        for step, change in enumerate(changes):
            owned = 0 < step < steps - 1
            total += change if owned else 0.0
            row.append(not (owned and total < threshold))
            if row[-1]:
                total = 0.0
        return row

    def share(threshold: float) -> float:
        return math.fsum(sum(computed(one, threshold)) / steps for one in changes) / len(changes)

    largest = max(sum(max(value, 0.0) for value in one) for one in changes) + 1e-6
    threshold = _chosen(share, _grid(largest), cost)
    shown = [float(f"{value:.6g}") for value in changes[0]]
    return _Made(
        f"""\
policy teacache "TeaCache, calibrated"
source "arXiv:2411.19108"
param threshold: float = {threshold!r} in [0, inf) "largest accumulated change that still reuses"
param coefficients: list = {_list(coefficients)} "from the change of the input to that of the output"
signal modulated = {series[0].probe}
signal change = poly(coefficients, relative_l1(modulated, prev(modulated)))
match blocks when 0 < step < steps - 1 while sum(change) < threshold -> reuse residual
expect blocks over {steps} steps with change = {_list(shown)}: {_row(computed(shown, threshold))}
""",
        threshold,
        share(threshold),
    )


def _smoothcache(series: Sequence[_Series], cost: float) -> _Made:
    steps = series[0].steps
    kinds = [kind for kind in _COMPONENTS if any(key[0] == kind for one in series for key in one.errors)]
    curves = dict[tuple[str, int, int], float]()
    for key in {key for one in series for key in one.errors}:
        values = [value for one in series for value in one.errors.get(key, ())]
        curves[key] = math.fsum(values) / len(values)

    def computed(kind: str, threshold: float) -> list[bool]:
        row, step = [False] * steps, 0
        while step < steps:
            row[step] = True
            # The last step computes.
            reach = [
                distance
                for distance in range(1, REACH + 1)
                if step + distance < steps - 1 and curves.get((kind, distance, step), math.inf) <= threshold
            ]
            step += max(reach, default=0) + 1
        row[-1] = True
        return row

    def share(threshold: float) -> float:
        return math.fsum(sum(computed(kind, threshold)) / steps for kind in kinds) / len(kinds)

    threshold = _chosen(share, {0.0, *curves.values()}, cost)
    rows = {kind: computed(kind, threshold) for kind in kinds}
    rules = [f'match {kind} mask "{"".join("01"[one] for one in row)}" -> reuse' for kind, row in rows.items()]
    expects = [f"expect {kind} over {steps} steps: {_row(row)}" for kind, row in rows.items()]
    lines = ['policy smoothcache "SmoothCache, calibrated"', 'source "arXiv:2411.10510"', *rules, *expects]
    return _Made("\n".join(lines) + "\n", threshold, share(threshold))
