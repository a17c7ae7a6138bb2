"""Caches on a GPU: seconds a trajectory, device waits, memory and agreement of ours, diffusers' hooks and cache-dit.

A Flux of the real size (19 + 38 blocks, width 3072, 1024 x 1024, 28 steps) and a Wan of the size of 1.3B, in
bfloat16, with random weights that are drawn on the device, so nothing is downloaded. All ways of a model share its
weights and its noise. Each runs a trajectory to warm up, in which its computed calls and its device waits are
counted, then the ways take turns for `--rounds` timed trajectories. First Block Cache's threshold is the median
drift of the model itself, so that about half of its steps reuse. With compilers, the ways of `COMPILED` run once
more with the repeated blocks compiled. A way that would begin after `--budget` seconds is left out, and the table
says so.

`python -m benchmarks.gpu --json gpu.json` is meant to take at most 8 minutes on one GPU of 80 GB. `--small --device
cpu` is the same with tiny models, to see that it runs; its figures mean nothing. cache-dit's rows need cache-dit
(1.5.3).
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FluxTransformer2DModel,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)
from diffusers.hooks import apply_pyramid_attention_broadcast, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cachepolicy
from benchmarks import fbc
from benchmarks._measure import table
from benchmarks.pab import picture_ids, twin

GIB = 2**30


# --- models ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Subject:
    """A model with the inputs of its calls.

    Attributes:
        model: The bare model.
        noise: The latents that a trajectory begins with.
        inputs: The arguments that stay the same in all steps.
        scale: What a timestep in 0..1000 is divided by.
        last: Name of a module that runs where the last block computes, and only there.
        steps: The number of steps.
    """

    model: nn.Module
    noise: Tensor
    inputs: Mapping[str, Any]
    scale: float
    last: str
    steps: int
    t: Tensor = field(default_factory=lambda: torch.tensor(1000.0))
    number: float = 1000.0

    def current(self) -> Tensor:
        """The timestep of the step that runs, on the device, as pipelines show it to diffusers' hooks."""
        return self.t

    def known(self) -> float:
        """The same as a number. Ours reads the timesteps of a scheduler once a trajectory."""
        return self.number

    @torch.inference_mode()
    def trajectory(self, model: nn.Module) -> Tensor:
        """Euler steps of a flow from the noise, and the latents at the end."""
        latents = self.noise
        timesteps = torch.linspace(1000, 1000 / self.steps, self.steps, device=latents.device)
        for t, number in zip(timesteps, timesteps.tolist(), strict=True):
            self.t, self.number = t, number
            time = (t / self.scale).to(latents.dtype).expand(len(latents))
            velocity = model(hidden_states=latents, timestep=time, return_dict=False, **self.inputs)[0]
            latents = latents - velocity / self.steps
        return latents


def _random(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)


def _built(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a model whose weights are drawn on the device in their own precision."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def flux(device: torch.device, dtype: torch.dtype, *, small: bool) -> Subject:
    """FLUX.1's transformer at 1024 x 1024, or one of 1 + 1 blocks."""
    double, single, heads, edge, text, joint = (1, 1, 1, 4, 4, 32) if small else (19, 38, 24, 64, 512, 4096)
    build = functools.partial(
        FluxTransformer2DModel,
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=heads,
        joint_attention_dim=joint, pooled_projection_dim=32 if small else 768, guidance_embeds=True,
    )  # fmt: skip
    draw = _random(device, dtype)
    inputs = {
        "encoder_hidden_states": draw(1, text, joint),
        "pooled_projections": draw(1, 32 if small else 768),
        "guidance": torch.full((1,), 3.5, device=device, dtype=dtype),
        "img_ids": picture_ids(edge).to(device, dtype),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }
    last = f"single_transformer_blocks.{single - 1}.attn.to_q"
    model = _built(build, device, dtype)
    return Subject(model, draw(1, edge**2, 64), inputs, 1000.0, last, 6 if small else 28)


def wan(device: torch.device, dtype: torch.dtype, *, small: bool) -> Subject:
    """Wan 2.1's transformer of 1.3B at 480 x 832 and 33 frames, or one of two blocks."""
    layers, heads, ffn, text, joint = (2, 1, 64, 4, 32) if small else (30, 12, 8960, 512, 4096)
    build = functools.partial(
        WanTransformer3DModel,
        num_attention_heads=heads, attention_head_dim=128, text_dim=joint, ffn_dim=ffn, num_layers=layers,
    )  # fmt: skip
    draw = _random(device, dtype)
    shape = (1, 16, 2, 4, 4) if small else (1, 16, 9, 60, 104)
    inputs = {"encoder_hidden_states": draw(1, text, joint)}
    model = _built(build, device, dtype)
    return Subject(model, draw(*shape), inputs, 1.0, f"blocks.{layers - 1}.attn1.to_q", 6 if small else 28)


SUBJECTS: Mapping[str, Callable[..., Subject]] = {"flux": flux, "wan": wan}


# --- ways ------------------------------------------------------------------------------------------------

Put = Callable[[nn.Module, Subject, float], None]
"""Puts a cache on a model: the model, its subject, and the threshold of First Block Cache."""

_TAYLOR = TaylorSeerCacheConfig(
    cache_interval=4, disable_cache_before_step=3, max_order=1, taylor_factors_dtype=torch.float32,
    cache_identifiers=["^(single_)?(transformer_)?blocks.*attn1?$"],
)  # fmt: skip
"""With the differences in single precision, as ours keeps them; diffusers' default rounds them to bfloat16. Its default
identifiers match no module of Wan."""


def _ours(policy: str | cachepolicy.Policy) -> Put:
    def put(model: nn.Module, subject: Subject, _: float) -> None:
        cachepolicy.apply(model, policy, timestep=subject.known)

    return put


def _fbc(system: str) -> Put:
    def put(model: nn.Module, subject: Subject, threshold: float) -> None:
        fbc.SYSTEMS[system](model, threshold, subject.known)

    return put


def _planned(model: nn.Module, subject: Subject, _: float) -> None:
    """A list as the tuner writes it, for 28 steps: denser at both ends."""
    listed = "0, 1, 3" if subject.steps < 28 else "0, 1, 3, 5, 8, 11, 14, 17, 20, 23, 25, 27"
    policy = cachepolicy.parse(f"match model on {{{listed}}} -> predict taylor(order: 1)\n")
    cachepolicy.apply(model, policy, timestep=subject.known)


def _diffusers_pab(model: nn.Module, subject: Subject, _: float) -> None:
    """Twice as often in attention, as `pab.cp` does without params."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=subject.current
    )
    apply_pyramid_attention_broadcast(model, config)


def _diffusers_taylorseer(model: nn.Module, _: Subject, __: float) -> None:
    """Every fourth step, of attention."""
    apply_taylorseer_cache(model, _TAYLOR)
    _set_cache_context(model, CacheContext("only"))


def _bare(_: nn.Module, __: Subject, ___: float) -> None:
    """No cache."""


WAYS: Mapping[str, Put] = {
    "bare": _bare,
    "PAB, ours": _ours("pab"),
    "PAB, diffusers": _diffusers_pab,
    "FBC, ours": _fbc("ours"),
    "FBC, diffusers": _fbc("diffusers"),
    "FBC, cache-dit": _fbc("cache-dit"),
    "TaylorSeer, ours": _ours(cachepolicy.parse(cachepolicy.convert(_TAYLOR))),
    "TaylorSeer, diffusers": _diffusers_taylorseer,
    "planned list, ours": _planned,
}
COMPILED = ("bare", "PAB, ours", "FBC, ours", "FBC, diffusers", "FBC, cache-dit", "planned list, ours")


# --- measurement -----------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device.

    On the CPU nothing waits, and what is counted includes the check that answers are finite, which runs there alone.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.count = device.type, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation. To read a number of the device is to wait, and so is to copy to the host."""
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # In inference mode `item` is not taken apart into `_local_scalar_dense`.
        reads = name in ("item", "_local_scalar_dense", "is_nonzero", "equal")
        copies = name in ("_to_copy", "copy_") and result.device.type != self.device
        self.count += (reads or copies) and any(
            isinstance(value, Tensor) and value.device.type == self.device for value in args
        )
        return result


@dataclass(slots=True)
class Measured:
    """What was measured of one way.

    Attributes:
        way: The name of the way.
        compiled: Whether the repeated blocks are compiled.
        computed: The steps at which the last block computed, as a row of `C` and `R`.
        waits: Device waits of a trajectory, without those of the loop itself.
        seconds: The seconds of each timed trajectory.
        peak: Bytes on the device above those of the bare model, or None without a GPU.
        equal: Whether the latents are bitwise those of ours with the same method, or None for a single one.
        error: Why there is no figure, or None.
    """

    way: str
    compiled: bool
    computed: str = ""
    waits: int = 0
    seconds: list[float] = field(default_factory=list[float])
    peak: int | None = None
    equal: bool | None = None
    error: str | None = None


@dataclass(slots=True)
class Bench:
    """All ways on one model."""

    name: str
    subject: Subject
    rounds: int
    deadline: float
    models: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    latents: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    results: list[Measured] = field(default_factory=list[Measured])

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.subject.noise.device

    def drift(self) -> float:
        """The median drift of First Block Cache over the steps, which makes about half of them reuse."""
        model = twin(self.subject.model)
        run = cachepolicy.apply(model, "fbc", timestep=self.subject.known, threshold=1e-12)
        self.subject.trajectory(model)
        calls = run.trace.trajectories[-1].calls
        drifts = [numbers["drift"] for call in calls for numbers in call.signals.values() if "drift" in numbers]
        run.remove()
        return statistics.median(value for value in drifts if value > 0)

    def run(self, ways: Sequence[str], threshold: float, *, compiled: bool) -> None:
        """Measure ways, first each by itself and then in turns."""
        found = [self.warmed(way, threshold, compiled=compiled) for way in ways]
        timed = [result for result in found if result.error is None]
        shuffle = random.Random(0).shuffle
        for _ in range(self.rounds):
            shuffle(timed)
            for result in timed:
                result.seconds.append(self.seconds(self.models[result.way]))
        self.results += found
        self.models.clear()
        gc.collect()

    def warmed(self, way: str, threshold: float, *, compiled: bool) -> Measured:
        """Put a way on a twin and run it once, counted."""
        result = Measured(way, compiled)
        if time.monotonic() > self.deadline:
            result.error = "no time left"
            return result
        if "cache-dit" in way and importlib.util.find_spec("cache_dit") is None:
            result.error = "cache-dit is not installed"
            return result
        model = twin(self.subject.model)
        try:
            WAYS[way](model, self.subject, threshold)
            if compiled:
                torch._dynamo.reset()  # noqa: SLF001 (the counterpart of the public `torch.compiler.reset` before 2.6)
                model.compile_repeated_blocks()
                self.subject.trajectory(model)
                self.latents[f"{way}, compiled"] = self.subject.trajectory(model)
            else:
                result.computed, result.waits = self.counted(way, model)
            result.peak = self.peak(model)
        except Exception as error:  # noqa: BLE001 - one way that fails must not lose the figures of the others
            result.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            return result
        self.models[way] = model
        result.equal = self.agrees(way, compiled=compiled)
        return result

    def counted(self, way: str, model: nn.Module) -> tuple[str, int]:
        """Run a trajectory and return where the last block computed, and how often the host waited."""
        row, ran = list[str](), list[int]()
        hooks = [
            model.get_submodule(self.subject.last).register_forward_pre_hook(lambda *_: ran.append(1)),
            model.register_forward_hook(lambda *_: (row.append("C" if ran else "R"), ran.clear())[0]),
        ]
        with Waits(self.device) as waits:
            self.latents[way] = self.subject.trajectory(model)
        for hook in hooks:
            hook.remove()
        return "".join(row), waits.count

    def agrees(self, way: str, *, compiled: bool) -> bool | None:
        """Return whether a way's latents are bitwise those of our way of the same method, or None for ours."""
        method, _, system = way.partition(", ")
        suffix = ", compiled" if compiled else ""
        ours = self.latents.get(f"{method}, ours{suffix}")
        return None if system in ("", "ours") or ours is None else torch.equal(self.latents[way + suffix], ours)

    def peak(self, model: nn.Module) -> int | None:
        """Return the bytes that a trajectory allocates at most, above what stays allocated without it."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.subject.trajectory(model)
        return torch.cuda.max_memory_allocated() - before

    def seconds(self, model: nn.Module) -> float:
        """Return the seconds of one trajectory, to the end of its work on the device."""
        self.synchronize()
        begin = time.perf_counter()
        self.subject.trajectory(model)
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def lines(self) -> str:
        """The table of this model."""
        compiled = sorted({result.compiled for result in self.results})
        return "\n\n".join(self._lines(compiled=value) for value in compiled)

    def _lines(self, *, compiled: bool) -> str:
        results = [result for result in self.results if result.compiled == compiled]
        bare = next((result for result in results if result.way == "bare" and result.seconds), None)
        rows = dict[str, list[object]]()
        for result in results:
            if result.error is not None:
                rows[result.way] = [result.error, "", "", "", "", ""]
                continue
            ratios = (
                [] if bare is None else [own / base for own, base in zip(result.seconds, bare.seconds, strict=True)]
            )
            base = None if bare is None else bare.peak
            more = "" if result.peak is None or base is None else f"{(result.peak - base) / GIB:.2f}"
            rows[result.way] = [
                f"{statistics.median(result.seconds):.3f}",
                f"{statistics.median(ratios):.3f}" if ratios else "",
                result.computed,
                "" if compiled else result.waits,
                more,
                {None: "", True: "yes", False: "no"}[result.equal],
            ]
        heads = ["seconds", "/ bare", "last block", "waits", "GiB more", "bitwise ours"]
        return table(f"{self.name}{', blocks compiled' if compiled else ''}", heads, rows)


def machine(device: torch.device) -> dict[str, str]:
    """What the figures hold for."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "cachepolicy": cachepolicy.__version__, "python": platform.python_version()}
    return {"device": name, "date": time.strftime("%Y-%m-%d"), **versions}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further way begins")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU: `--small --device cpu` shows that the benchmark runs")
    dtype = torch.float32 if options.small else torch.bfloat16
    deadline = time.monotonic() + options.budget
    figures: dict[str, Any] = {"machine": machine(device), "small": options.small, "models": {}}
    print(json.dumps(figures["machine"]))
    for number, name in enumerate(options.models):
        # Each model may use its share of what is left.
        share = time.monotonic() + (deadline - time.monotonic()) / (len(options.models) - number)
        bench = Bench(name, SUBJECTS[name](device, dtype, small=options.small), options.rounds, share)
        threshold = bench.drift()
        bench.run(list(WAYS), threshold, compiled=False)
        if not options.eager:
            bench.run(COMPILED, threshold, compiled=True)
        print(f"\nFirst Block Cache's threshold: {threshold:.4g}\n{bench.lines()}", flush=True)
        figures["models"][name] = {"threshold": threshold, "ways": [asdict(result) for result in bench.results]}
        del bench
        gc.collect()
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
