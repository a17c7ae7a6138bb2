"""Toy denoisers of plain torch for tests of policies.

The options of `Toy` are traits of real models that have broken caches: blocks that return tuples or dicts, in-place
writes, a model that ignores its timestep, nested stages.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Blocks return several forms on purpose, so their results have no static type.

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
    """The configuration of a toy denoiser.

    Attributes:
        blocks: The number of blocks, or of blocks in each stage.
        width: The number of channels of both streams.
        returns: The form in which a block returns its two streams; `"tensor"` returns the first stream only.
        in_place: If True, a block writes into the tensor that its attention returned.
        blind: If True, the timestep does not change the output.
        cross: If True, each block has a cross-attention too.
        stages: The number of stages that hold the blocks; 0 puts the blocks in one `nn.ModuleList` at the root.
    """

    blocks: int = 2
    width: int = 8
    returns: Returns = "tensor"
    in_place: bool = False
    blind: bool = False
    cross: bool = False
    stages: int = 0

    def build(self, seed: int = 0) -> ToyDiT:
        """Build the model in eval mode, with every parameter drawn from `seed`."""
        model = ToyDiT(self)
        redraw(model, seed)
        return model.eval()


class Attention(nn.Module):
    """Attention with one head. Keys and values come from `context` if it is given, else from `x`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from `x`, of shape `(B, S, C)`, to `context`, of shape `(B, T, C)`."""
        source = x if context is None else context
        weights = self.to_q(x) @ self.to_k(source).transpose(-1, -2)
        return weights.softmax(-1) @ self.to_v(source)


class CrossAttention(Attention):
    """An attention whose class name marks it as cross-attention."""


class FeedForward(nn.Module):
    """A feed-forward network of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of `x`, of shape `(B, S, C)`."""
        return self.down(torch.tanh(self.up(x)))


class Block(nn.Module):
    """A transformer block with two streams: attention and feed-forward on `x`, modulated by the timestep.

    The second stream, `context`, changes in each block and is returned with the first.
    """

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.norm = nn.LayerNorm(toy.width)
        self.attn = Attention(toy.width)
        self.cross = CrossAttention(toy.width) if toy.cross else None
        self.ff = FeedForward(toy.width)
        self.modulation = nn.Linear(toy.width, 2 * toy.width)

    def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
        """Return both streams in the form `toy.returns`; the form `"tensor"` holds the first stream only."""
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
    """Consecutive blocks in one module."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.toy = toy
        self.blocks = nn.ModuleList(Block(toy) for _ in range(toy.blocks))

    def forward(self, x: Tensor, context: Tensor, step: Tensor) -> Any:
        """Return the streams after the last block, in the form `toy.returns`."""
        for block in self.blocks:
            x, context = _streams(block(x, context, step), context)
        return _form(self.toy.returns, x, context)


class ToyDiT(nn.Module):
    """A denoiser with positional arguments, `model(x, t, y)`, like the one of facebookresearch/DiT."""

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
        """Predict at one timestep.

        Args:
            x: The latents, `(B, S, C)`.
            t: The training timestep, 0 to 1000, one number or one for each sample.
            y: The conditioning, `(B, T, C)`.

        Returns:
            The prediction, `(B, S, C)`.
        """
        time = (t.to(x.dtype) / 1000).reshape(-1, 1).expand(len(x), 1)
        step = self.embed(torch.zeros_like(time) if self.toy.blind else time)
        context = y
        for block in self.stages if self.toy.stages else self.blocks:
            x, context = _streams(block(x, context, step), context)
        return self.out(x)


class Shared(nn.Module):
    """A model whose forward calls the same feed-forward module twice."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.ff = FeedForward(width)
        redraw(self, 0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Combine two calls of `ff`. Timestep and conditioning change nothing."""
        return self.ff(x) + 2 * self.ff(x + 1)


class Failing(nn.Module):
    """A module that raises `error` at the calls whose numbers (from 0) are in `at` and else returns its input."""

    def __init__(self, at: Sequence[int] = (), error: BaseException | None = None) -> None:
        super().__init__()
        self.at = frozenset(at)
        self.error = RuntimeError("the forward failed") if error is None else error
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`, or raise the error."""
        self.calls += 1
        if self.calls - 1 in self.at:
            raise self.error
        return x


def failing(model: ToyDiT, at: Sequence[int], error: BaseException | None = None) -> ToyDiT:
    """Make a toy raise after its last block.

    Args:
        model: The toy. It is changed in place.
        at: The numbers of the calls that raise, from 0.
        error: The exception to raise; a RuntimeError by default.

    Returns:
        The same model.
    """
    model.out = nn.Sequential(Failing(at, error), model.out)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def inputs(toy: Toy, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw the tensors of one call.

    Args:
        toy: The configuration of the toy.
        batch: The number of samples B.
        seed: The seed of the random generator.

    Returns:
        The latents `(B, 4, C)` and the conditioning `(B, 3, C)`.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, TOKENS, toy.width, generator=generator)
    return x, torch.randn(batch, CONTEXT, toy.width, generator=generator)


def sample(
    model: nn.Module, timesteps: Sequence[float], x: Tensor, y: Tensor | Sequence[Tensor], *, still: bool = False
) -> Iterator[Tensor]:
    """Sample without a scheduler: each step subtracts a tenth of the mean prediction from the latents.

    Args:
        model: A model that is called as `model(x, t, y)`.
        timesteps: The training timesteps, in the order of the calls.
        x: The initial latents, `(B, S, C)`.
        y: The conditioning, `(B, T, C)`. Several conditionings are the branches of sequential guidance: the model is
            called once for each of them on every step.
        still: If True, the latents stay as they are.

    Yields:
        The predictions, `(B, S, C)`, in the order of the calls.
    """
    conditionings = [y] if isinstance(y, Tensor) else list(y)
    for t in timesteps:
        timestep = torch.tensor(float(t))
        predictions = [model(x, timestep, conditioning) for conditioning in conditionings]
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
    """Counts the executions of every module of a model by forward pre-hooks.

    A policy replaces the call of a module, so a module that a policy answers is not counted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counts: dict[str, int] = {name: 0 for name, _ in model.named_modules()}
        self._handles = [
            module.register_forward_pre_hook(self._counter(name)) for name, module in model.named_modules()
        ]

    def _counter(self, name: str) -> Any:
        def count(*_: Any) -> None:
            self.counts[name] += 1

        return count

    def take(self) -> dict[str, int]:
        """Return the executions by module name since the last call of `take`, and start again from 0."""
        taken = dict(self.counts)
        self.counts = dict.fromkeys(taken, 0)
        return taken

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
