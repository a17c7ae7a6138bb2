"""Pyramid Attention Broadcast on a middle-sized Flux: the bare model, diffusers' hooks, `pab.cp`, and the ideal.

The ideal is the same model whose skipped attention modules are replaced by a stub that returns a stored tensor: nobody
can be faster with this schedule. It is run twice under two names, which shows how far two equal ways differ here. All
ways share their weights and take every step in turn, on the same latents. `python -m benchmarks.pab`
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PyramidAttentionBroadcastConfig
from diffusers.hooks import apply_pyramid_attention_broadcast
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

import cachepolicy
from benchmarks._measure import NOTHING, Spread, Taken, one_thread, spread, table, timed

WINDOW = (100, 800)


@dataclass(frozen=True, slots=True)
class Setting:
    """The model (double and single blocks, heads of 64, picture tokens along one edge) and its run."""

    double: int = 8
    single: int = 8
    heads: int = 8
    edge: int = 15
    text: int = 31
    steps: int = 12
    every: int = 3

    def model(self) -> FluxTransformer2DModel:
        """The bare model, its weights drawn at random."""
        return FluxTransformer2DModel(
            in_channels=16, num_layers=self.double, num_single_layers=self.single, attention_head_dim=64,
            num_attention_heads=self.heads, joint_attention_dim=64, pooled_projection_dim=64,
            axes_dims_rope=(8, 28, 28),
        ).eval()  # fmt: skip

    def timesteps(self) -> list[Tensor]:
        """Falling timesteps in training units, each an element of one tensor, as a scheduler's are."""
        return list(torch.linspace(1000, 1000 / self.steps, self.steps))

    def inputs(self) -> dict[str, Tensor]:
        """What stays the same in all steps."""
        return {
            "encoder_hidden_states": torch.randn(1, self.text, 64),
            "pooled_projections": torch.randn(1, 64),
            "img_ids": picture_ids(self.edge),
            "txt_ids": torch.zeros(self.text, 3),
        }


def picture_ids(edge: int) -> Tensor:
    """Flux' positions of the picture tokens, `(edge * edge, 3)`: 0, the row and the column."""
    rows, columns = torch.meshgrid(torch.arange(edge), torch.arange(edge), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


class Loop:
    """What the ways share: the current timestep, which pipelines show as `current_timestep`, and the inputs."""

    def __init__(self, setting: Setting) -> None:
        self.timesteps = setting.timesteps()
        self.inputs = setting.inputs()
        self.noise = torch.randn(1, setting.edge**2, 16)
        self.t = self.timesteps[0]

    def current(self) -> Tensor:
        """The timestep of the step that runs."""
        return self.t

    def call(self, model: nn.Module, latents: Tensor) -> Tensor:
        """One call of the model at the current timestep."""
        return model(latents, timestep=self.t.reshape(1) / 1000, return_dict=False, **self.inputs)[0]

    def steps(self) -> Iterator[int]:
        """The numbers of the steps, each timestep current in its turn."""
        for step, t in enumerate(self.timesteps):
            self.t = t
            yield step


def twin(model: nn.Module) -> nn.Module:
    """Another model with the same weights in the same memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """What PAB takes for attention."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AttentionModuleMixin)}


class Stored(nn.Module):
    """Stands for a module that is skipped: it returns a stored output."""

    output: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        """The stored output."""
        return self.output


def place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules where the names say."""
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def skipped(step: int, t: float, every: int) -> bool:
    """Whether PAB answers a step from its cache."""
    return WINDOW[0] < t < WINDOW[1] and step % every != 0


@dataclass(slots=True)
class Ideal:
    """A model that is rebuilt before a step, off the clock: with its modules, or with stubs in their places."""

    model: nn.Module
    kept: Mapping[int, Mapping[str, Any]]
    """What each module gave, by step that computed and name."""
    every: int
    computing: dict[str, nn.Module] = field(init=False)
    stubs: dict[str, Stored] = field(init=False)

    def __post_init__(self) -> None:
        self.computing = attentions(self.model)
        self.stubs = {name: Stored() for name in self.computing}

    def prepare(self, step: int, t: float) -> None:
        """Make the model what this step needs."""
        skips = skipped(step, t, self.every)
        if skips:
            newest = self.kept[max(each for each in self.kept if each < step)]
            for name, stub in self.stubs.items():
                stub.output = newest[name]
        place(self.model, self.stubs if skips else self.computing)


def recorded(model: nn.Module, loop: Loop, every: int) -> dict[int, dict[str, Any]]:
    """What the attention modules give at each step that computes, in a run under diffusers' hooks."""
    kept = dict[int, dict[str, Any]]()
    now = dict[str, Any]()
    record, handles = twin(model), list[Any]()
    for name, module in attentions(record).items():
        handles.append(module.register_forward_hook(lambda _, __, output, name=name: now.__setitem__(name, output)))
    apply_pyramid_attention_broadcast(record, config(loop, every))
    latents = loop.noise
    for step in loop.steps():
        latents = moved(latents, loop.call(record, latents), loop)
        if not skipped(step, float(loop.t), every):
            kept[step] = dict(now)
    return kept


def config(loop: Loop, every: int) -> PyramidAttentionBroadcastConfig:
    """The setting in diffusers' words."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=every,
        spatial_attention_timestep_skip_range=WINDOW,
        current_timestep_callback=loop.current,
    )


def moved(latents: Tensor, velocity: Tensor, loop: Loop) -> Tensor:
    """The latents of the next step."""
    return latents - velocity / len(loop.timesteps)


# --- the measurement -------------------------------------------------------------------------------------

WAYS = ("bare", "diffusers", "ours", "ideal", "ideal again")


@dataclass(slots=True)
class Bench:
    """All ways to run one model, and what they took: by round, step and way."""

    setting: Setting
    loop: Loop
    models: dict[str, nn.Module]
    ideals: list[Ideal]
    run: cachepolicy.Run
    taken: list[list[dict[str, Taken]]] = field(default_factory=list[list[dict[str, Taken]]])
    equal: bool = True

    def round(self, shuffle: Callable[[list[str]], None]) -> None:
        """One trajectory; at each step all ways run in an order of its own."""
        latents, order = self.loop.noise, list(WAYS)
        self.taken.append([])
        reset(self.models["diffusers"])
        for step in self.loop.steps():
            for ideal in self.ideals:
                ideal.prepare(step, float(self.loop.t))
            shuffle(order)
            outputs, taken = dict[str, Tensor](), dict[str, Taken]()
            for way in order:
                taken[way], outputs[way] = timed(functools.partial(self.loop.call, self.models[way], latents))
            self.taken[-1].append(taken)
            self.equal &= all(torch.equal(outputs[way], outputs["diffusers"]) for way in WAYS[1:])
            latents = moved(latents, outputs["ours"], self.loop)

    @property
    def skips(self) -> frozenset[int]:
        """The steps that PAB answers from its cache."""
        times = enumerate(self.loop.timesteps)
        return frozenset(step for step, t in times if skipped(step, float(t), self.setting.every))

    def runs(self, way: str) -> list[Taken]:
        """What whole trajectories took."""
        return [sum((each[way] for each in steps), start=NOTHING) for steps in self.taken]

    def steps(self, way: str, skips: bool) -> list[Taken]:
        """What single steps took that skip, or that do not."""
        return [each[way] for steps in self.taken for step, each in enumerate(steps) if (step in self.skips) == skips]


def reset(model: Any) -> None:
    """Forget diffusers' caches, as its pipelines do at their end."""
    for module in attentions(model).values():
        module._diffusers_hook.reset_stateful_hooks(recurse=False)  # noqa: SLF001 - it has no other name


def prepare(setting: Setting) -> Bench:
    """Build all ways over one set of weights."""
    model, loop = setting.model(), Loop(setting)
    kept = recorded(model, loop, setting.every)
    models = {way: twin(model) for way in WAYS}
    apply_pyramid_attention_broadcast(models["diffusers"], config(loop, setting.every))
    run = cachepolicy.apply(
        models["ours"], "pab.cp", timestep=loop.current, spatial_every=setting.every, spatial_range=WINDOW
    )
    ideals = [Ideal(models[way], kept, setting.every) for way in ("ideal", "ideal again")]
    return Bench(setting, loop, models, ideals, run)


def report(bench: Bench) -> Iterator[str]:
    """The tables of one measurement."""
    parameters = sum(each.numel() for each in bench.models["bare"].parameters()) / 1e6
    setting, seconds = bench.setting, spread([each.cpu for each in bench.runs("bare")])
    tokens = setting.edge**2 + setting.text
    yield (
        f"Flux with {setting.double} + {setting.single} blocks, width {64 * setting.heads}, {parameters:.0f} M "
        f"parameters, {tokens} tokens; {setting.steps} steps, attention skipped on {len(bench.skips)} of them; "
        f"{len(bench.taken)} trajectories, bare {seconds:.2f} s CPU each.\n"
        f"Ratios within one trajectory or one step, median [quartiles]."
    )
    yield f"outputs of ours, diffusers and the ideal bitwise equal at every step: {'yes' if bench.equal else 'NO'}\n"
    for title, base in (("time / the ideal's", "ideal"), ("time / the bare model's", "bare")):
        rows = {way: list(_ratios(bench, way, base)) for way in WAYS if way != base}
        yield (
            table(title, ["CPU, a run", "wall, a run", "CPU, a step that computes", "CPU, a step that skips"], rows)
            + "\n"
        )
    yield verdict(bench)


def _ratios(bench: Bench, way: str, base: str) -> Iterator[str]:
    """Whole trajectories, then single steps of one way against another."""
    for clock in ("cpu", "wall"):
        yield f"{_ratio(bench.runs(way), bench.runs(base), clock):.3f}"
    for skips in (False, True):
        yield f"{_ratio(bench.steps(way, skips), bench.steps(base, skips), 'cpu'):.3f}"


def _ratio(these: Sequence[Taken], those: Sequence[Taken], clock: str) -> Spread:
    return spread([getattr(a, clock) / getattr(b, clock) for a, b in zip(these, those, strict=True)])


def verdict(bench: Bench) -> str:
    """Whether ours is within 3 % of the ideal, or as near to it as the ideal is to itself."""
    ours = _ratio(bench.runs("ours"), bench.runs("ideal"), "cpu")
    again = _ratio(bench.runs("ideal again"), bench.runs("ideal"), "cpu")
    lost = f"ours takes {100 * (ours.median - 1):+.1f} % of the ideal's CPU time"
    if ours.median <= 1.03:
        return f"{lost}: within 3 %"
    alike = ours.low <= again.high and again.low <= ours.high
    return f"{lost}: more than 3 %, {'and' if alike else 'but not'} within what the ideal differs from itself"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    setting = Setting()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in setting.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=int, default=getattr(setting, name))
    parser.add_argument("--rounds", type=int, default=3, help="trajectories")
    given = vars(parser.parse_args(arguments))
    number = given.pop("rounds")
    one_thread()
    with torch.no_grad():
        bench = prepare(Setting(**given))
        for _ in range(number):
            bench.round(random.Random(len(bench.taken)).shuffle)
    for text in report(bench):
        print(text)


if __name__ == "__main__":
    main()
