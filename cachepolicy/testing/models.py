"""Toy denoisers of plain torch, each trait of which has broken some cache: what to test policies and engines with."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Models are called with anything and return anything: what comes out of it has no type to know.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Returns = Literal["tensor", "tuple", "list", "dict"]

TOKENS, CONTEXT = 4, 3


@dataclass(frozen=True, slots=True)
class Toy:
    """What a toy is like.

    `returns`: the form in which blocks hand on their two streams. `in_place`: a block writes into what its attention
    returned. `blind`: the step changes nothing. `stages`: blocks stand in so many stages, 0 for one plain list.
    """

    blocks: int = 2
    width: int = 8
    returns: Returns = "tensor"
    in_place: bool = False
    blind: bool = False
    cross: bool = False
    stages: int = 0

    def build(self, seed: int = 0) -> ToyDiT:
        """The model in eval mode, every parameter drawn from `seed`."""
        model = ToyDiT(self)
        redraw(model, seed)
        return model.eval()


class Attention(nn.Module):
    """One head; keys and values from `context` where there is one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The attended values of `x`."""
        source = x if context is None else context
        weights = self.to_q(x) @ self.to_k(source).transpose(-1, -2)
        return weights.softmax(-1) @ self.to_v(source)


class CrossAttention(Attention):
    """An attention that is told from self-attention by its class name."""


class FeedForward(nn.Module):
    """Two linear maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The transformed tokens."""
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    """Attention and feed-forward, modulated by the step; `context` is a second stream that it hands on changed."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.norm = nn.LayerNorm(toy.width)
        self.attn = Attention(toy.width)
        self.cross = CrossAttention(toy.width) if toy.cross else None
        self.ff = FeedForward(toy.width)
        self.modulation = nn.Linear(toy.width, 2 * toy.width)

    def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
        """The streams in the form that the toy returns; of one tensor, the first stream alone."""
        scale, gate = self.modulation(step)[:, None].chunk(2, dim=-1)
        attended = self.attn(self.norm(x) * (1 + scale))
        x = x + (attended.mul_(gate) if self.toy.in_place else attended * gate)
        if self.cross is not None:
            x = x + self.cross(x, context)
        x = x + self.ff(x)
        return _form(self.toy.returns, x, context + x.mean())


def _form(returns: Returns, x: Tensor, context: Tensor) -> Any:
    match returns:
        case "tensor":
            return x
        case "tuple":
            return (x, context)
        case "list":
            return [x, context]
        case "dict":
            return {"x": x, "context": context}


def _streams(output: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(output, Tensor):
        return output, context
    if isinstance(output, dict):
        return output["x"], output["context"]
    first, second = output
    return first, second


class ToyStage(nn.Module):
    """A few blocks one after another, called as one module."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.blocks = nn.ModuleList(Block(toy) for _ in range(toy.blocks))

    def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
        """The streams after the last block."""
        for block in self.blocks:
            x, context = _streams(block(x, context, step), context)
        return _form(self.toy.returns, x, context)


class ToyDiT(nn.Module):
    """A denoiser that is called with plain positional arguments, `model(x, t, y)`, as facebookresearch/DiT is."""

    def __init__(self, toy: Toy | None = None) -> None:
        super().__init__()
        self.toy = toy = Toy() if toy is None else toy
        self.embed = nn.Linear(1, toy.width)
        if toy.stages:
            self.stages = nn.ModuleList(ToyStage(toy) for _ in range(toy.stages))
        else:
            self.blocks = nn.ModuleList(Block(toy) for _ in range(toy.blocks))
        self.out = nn.Linear(toy.width, toy.width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction at training timestep `t`, one number or one a sample; `y` is the conditioning."""
        moment = (t.to(x.dtype) / 1000).reshape(-1, 1).expand(len(x), 1)
        step = self.embed(torch.zeros_like(moment) if self.toy.blind else moment)
        context = y
        for block in self.stages if self.toy.stages else self.blocks:
            x, context = _streams(block(x, context, step), context)
        return self.out(x)


class Shared(nn.Module):
    """One feed-forward that a forward calls twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.ff = FeedForward(width)
        redraw(self, 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Both calls show in the output; neither step nor conditioning changes anything."""
        return self.ff(x) + 2 * self.ff(x + 1)


class Failing(nn.Module):
    """Raises `error` at the calls whose numbers (from 0) are in `at`, else gives what it was given."""

    def __init__(self, at: Sequence[int] = (), error: BaseException | None = None) -> None:
        super().__init__()
        self.at = frozenset(at)
        self.error = RuntimeError("the forward failed") if error is None else error
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """The input."""
        self.calls += 1
        if self.calls - 1 in self.at:
            raise self.error
        return x


def failing(model: ToyDiT, at: Sequence[int], error: BaseException | None = None) -> ToyDiT:
    """The toy, the call numbers `at` of which raise after its blocks have run."""
    model.out = nn.Sequential(Failing(at, error), model.out)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def inputs(toy: Toy, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Seeded latents and conditioning for one call."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, TOKENS, toy.width, generator=generator)
    return x, torch.randn(batch, CONTEXT, toy.width, generator=generator)


def sample(
    model: nn.Module, timesteps: Sequence[float], x: Tensor, y: Tensor | Sequence[Tensor], *, still: bool = False
) -> Iterator[Tensor]:
    """The predictions of a sampling loop, one call a step and conditioning; `still` never moves the latents.

    Several conditionings are the branches of sequential guidance; their predictions come one after another.
    """
    branches = [y] if isinstance(y, Tensor) else list(y)
    for t in timesteps:
        moment = torch.tensor(float(t))
        predictions = [model(x, moment, each) for each in branches]
        yield from predictions
        if not still:
            x = x - 0.1 * torch.stack(predictions).mean(0)


def redraw(model: nn.Module, seed: int) -> None:
    """Draw every parameter of a model from a seed.

    Many models initialise gates and modulations to zero, and some leave parameters uninitialised. Such a model would
    ignore its timestep, or differ from run to run.

    Args:
        model: The model. Its parameters are overwritten in place.
        seed: The seed of the random generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (parameter.numel() / max(1, len(parameter)) + 1e-9) ** -0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.05 * noise)
            else:
                parameter.copy_(0.1 * noise)


class Probes:
    """Counts the executions of modules by forward hooks, below any interception of the call."""

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, int] = {name: 0 for name, _ in model.named_modules()}
        self._handles = [module.register_forward_pre_hook(self._note(name)) for name, module in model.named_modules()]

    def _note(self, name: str) -> Any:
        def note(*_: Any) -> None:
            self.counts[name] += 1

        return note

    def take(self) -> dict[str, int]:
        """The executions by module name since the last call."""
        taken = dict(self.counts)
        self.counts = dict.fromkeys(taken, 0)
        return taken

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
