"""The description of a model of the zoo: a diffusers class, a small config, and the arguments of one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

Arguments = dict[str, Any]
"""The keyword arguments of one denoiser call."""


@dataclass(frozen=True, slots=True)
class Feed:
    """How a pipeline gives the timestep to its denoiser, from `t` in training units (0..1000, noise at 1000).

    Read from the pipelines of diffusers 0.42.1. The value is `t * scale`, or `(1000 - t) * scale` when reversed.
    `shape` says whether it comes as one number, once a sample, once a frame (dimension 1 of the latents), or as
    `rows` copies whatever the batch, with the numbers of `tail` behind. `also` names arguments that get the same.
    """

    argument: str = "timestep"
    scale: float = 1.0
    reverse: bool = False
    shape: Literal["scalar", "batch", "frames", "rows"] = "batch"
    rows: int = 1
    tail: tuple[float, ...] = ()
    also: tuple[str, ...] = ()

    def value(self, t: float) -> float:
        """The number that the model is called with at training timestep `t`."""
        return (1000.0 - t if self.reverse else t) * self.scale


RAW = Feed()
UNIT = Feed(scale=1e-3)
REVERSED_UNIT = Feed(scale=1e-3, reverse=True)


def embedding(name: str) -> Any:
    """A function of diffusers by which its pipelines make position embeddings."""
    from diffusers.models import embeddings

    return getattr(embeddings, name)


class Draw:
    """Seeded tensors of one call, in the order in which they are asked for."""

    def __init__(self, batch: int, seed: int) -> None:
        import torch

        self.batch = batch
        self._torch = torch
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers of one sample, with the batch in front."""
        return self.free(self.batch, *shape)

    def free(self, *shape: int) -> Tensor:
        """Standard normal numbers of exactly this shape."""
        return self._torch.randn(*shape, generator=self._generator)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to below `high`, with the batch in front."""
        return self._torch.randint(high, (self.batch, *shape), generator=self._generator)

    def ones(self, *shape: int) -> Tensor:
        """Ones, with the batch in front: a mask that hides nothing."""
        return self._torch.ones(self.batch, *shape)

    def true(self, *shape: int) -> Tensor:
        """A boolean mask that hides nothing, with the batch in front."""
        return self._torch.ones(self.batch, *shape, dtype=self._torch.bool)

    def full(self, *values: float) -> Tensor:
        """The same row of numbers for every sample."""
        return self._torch.tensor([values] * self.batch)

    def grid(self, *sizes: int, start: int = 0) -> Tensor:
        """Coordinates of a grid as rows, the last axis fastest, counted from `start` on each axis."""
        axes = [self._torch.arange(size) for size in sizes]
        rows = self._torch.stack(self._torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return rows.reshape(-1, len(sizes)).float() + start


@dataclass(frozen=True, slots=True)
class Entry:
    """A tiny seeded denoiser of one diffusers class.

    `name` is unique in the zoo, `class_name` a class that diffusers exports, `config` its keyword arguments,
    `arguments` gives all arguments of a call but the timestep. `latent` names the argument that a sampler updates.
    `cross` is a regex of the attention modules whose keys come from elsewhere than their queries; joint attention, over
    text and picture in one sequence, is not among them. Where `batches` is false the class takes one sample a call and
    has no batched guidance. `notes` say what is special.
    """

    name: str
    class_name: str
    config: Mapping[str, object]
    arguments: Callable[[Draw], Arguments]
    latent: str = "hidden_states"
    feed: Feed = RAW
    cross: str = "$^"
    batches: bool = True
    notes: str = ""

    @property
    def model_class(self) -> type[nn.Module]:
        """The class in diffusers; a test is skipped where the installed diffusers is older than the class."""
        import diffusers

        found = getattr(diffusers, self.class_name, None)
        if found is None:
            import pytest

            pytest.skip(f"diffusers {diffusers.__version__} has no {self.class_name}")
        return found

    def build(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, without gradients, every parameter drawn from `seed`."""
        import torch

        from cachepolicy.testing.models import redraw

        with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
            model = self.model_class(**self.config)
        redraw(model, seed)
        return model.eval().requires_grad_(False)

    def inputs(self, *, batch: int = 1, t: float = 500.0, seed: int = 0, x: Any = None) -> Arguments:
        """The keyword arguments of one call at training timestep `t`; `x` replaces the drawn latents."""
        draw = Draw(batch, seed)
        arguments = self.arguments(draw)
        if x is not None:
            arguments[self.latent] = x
        timestep = self._timestep(batch, t, arguments[self.latent])
        return {**arguments, **dict.fromkeys((self.feed.argument, *self.feed.also), timestep)}

    def _timestep(self, batch: int, t: float, latent: Any) -> Tensor:
        import torch

        value = self.feed.value(t)
        match self.feed.shape:
            case "scalar":
                return torch.tensor(value)
            case "batch":
                return torch.full((batch,), value)
            case "frames":
                return torch.full((batch, latent.shape[1]), value)
            case "rows":
                return torch.tensor([value] * self.feed.rows + list(self.feed.tail))
