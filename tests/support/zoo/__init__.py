"""A zoo of tiny denoisers, one for each architecture of diffusers, to test schedules and engines against.

Built from configs with seeded random weights: nothing is downloaded, a forward takes milliseconds on a CPU.
Needs diffusers; torch and diffusers are imported when a model is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tests.support.zoo import audio, image, joint, unet, video, wan
from tests.support.zoo.entry import Draw, Entry, Feed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "NOT_BUILT",
    "Draw",
    "Entry",
    "Feed",
    "Guidance",
    "Latents",
    "build",
    "entry",
    "names",
    "output",
    "trajectory",
]

Latents: TypeAlias = "Tensor | list[Tensor]"
"""What is sampled: a batch in one tensor, or a list of samples."""

Guidance = Literal["none", "batched", "sequential"]
"""Classifier-free guidance: no second branch, both branches in one batch, or two calls a step."""

NOT_BUILT = {
    "AnyFlowFARTransformer3DModel": "its causal attention needs compiled flex attention",
    "DreamLiteTransformer2DModel": "a part of DreamLiteUNetModel",
    "DreamLiteUNetModel": "close to UNet2DConditionModel, with blocks of its own: not yet written",
    "JoyImageEditPlusTransformer3DModel": "JoyImageEditTransformer3DModel with packed pictures: not yet written",
    "Kandinsky6SRTransformer3DModel": "its sparse attention needs compiled flex attention and tiles of 512 pixels",
    "MiniMaxMusic3RVQDepthDecoder": "autoregressive, no denoiser",
    "MotionAdapter": "weights to be put into UNetMotionModel, no denoiser",
    "RFD4ProteinaTransformer": "two latents with a timestep each",
    "SanaWMLTX2RefinerTransformer3DModel": "LTX2VideoTransformer3DModel's blocks with a cache of keys: not yet written",
    "SanaWMTransformer3DModel": "recurrent attention with camera poses: not yet written",
    "T5FilmDecoder": "autoregressive music decoder, deprecated",
    "Transformer2DModel": "a part of UNet2DConditionModel, and generic",
    "TransformerTemporalModel": "a part of UNetMotionModel and UNet3DConditionModel; ignores its timestep",
    "UNet1DModel": "attention that is no module of diffusers' attention classes",
    "UVit2DModel": "predicts tokens, has no timestep",
    "WanAnimate2Transformer3DModel": "takes a cache of keys filled by calls before the loop: not yet written",
}
"""Classes of diffusers' transformers and UNets that the zoo leaves out, with the reason."""

_ENTRIES = {
    item.name: item
    for item in (
        *image.ENTRIES,
        *joint.ENTRIES,
        *video.ENTRIES,
        *wan.ENTRIES,
        *audio.ENTRIES,
        *unet.ENTRIES,
    )
}


def names() -> tuple[str, ...]:
    """The names of all entries."""
    return tuple(_ENTRIES)


def entry(name: str) -> Entry:
    """The entry of that name; KeyError for an unknown one."""
    return _ENTRIES[name]


def build(name: str, seed: int = 0, **config: object) -> nn.Module:
    """The model of that name in eval mode, without gradients, drawn from `seed`; `config` replaces some settings."""
    found = _ENTRIES[name]
    return replace(found, config={**found.config, **config}).build(seed)


def output(result: Any) -> Any:
    """The prediction in what a denoiser returned: its first field, a tensor or a list of tensors."""
    return result[0]


def trajectory(
    name: str,
    model: nn.Module,
    timesteps: Iterable[float],
    *,
    batch: int = 1,
    guidance: Guidance = "none",
    seed: int = 0,
) -> Iterator[Latents]:
    """Sample without a scheduler, `x <- x - 0.1 * prediction`, and yield the prediction of each step.

    `timesteps` are in training units and decrease. With guidance the yielded prediction is the guided one, at weight 2.
    """
    one = _ENTRIES[name]
    x = one.inputs(batch=batch, seed=seed)[one.latent]
    for t in timesteps:
        prediction = _predict(one, model, x, t, batch, guidance, seed)
        yield prediction
        x = _step(x, prediction)


def _predict(one: Entry, model: nn.Module, x: Latents, t: float, batch: int, guidance: Guidance, seed: int) -> Latents:
    match guidance:
        case "none":
            return output(model(**one.inputs(batch=batch, t=t, seed=seed, x=x)))
        case "batched":
            both = output(model(**one.inputs(batch=2 * batch, t=t, seed=seed, x=_twice(x))))
            half = len(both) // 2
            return _guide(both[:half], both[half:])
        case "sequential":
            cond = output(model(**one.inputs(batch=batch, t=t, seed=seed, x=x)))
            uncond = output(model(**one.inputs(batch=batch, t=t, seed=seed + 1, x=x)))
            return _guide(uncond, cond)


def _twice(x: Latents) -> Latents:
    import torch

    return x + x if isinstance(x, list) else torch.cat([x, x])


def _guide(uncond: Latents, cond: Latents) -> Latents:
    if isinstance(uncond, list) or isinstance(cond, list):
        return [u + 2.0 * (c - u) for u, c in zip(uncond, cond, strict=True)]
    return uncond + 2.0 * (cond - uncond)


def _step(x: Latents, prediction: Latents) -> Latents:
    if isinstance(x, list) or isinstance(prediction, list):
        return [_subtract(old, new) for old, new in zip(x, prediction, strict=True)]
    return _subtract(x, prediction)


def _subtract(x: Tensor, prediction: Tensor) -> Tensor:
    # Learned sigmas widen the output, conditions widen the input: only what both have is updated.
    common = tuple(slice(0, min(a, b)) for a, b in zip(x.shape, prediction.shape, strict=True))
    updated = x.clone()
    updated[common] -= 0.1 * prediction[common]
    return updated
