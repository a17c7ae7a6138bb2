"""Arguments of one denoiser call on the meta device, for a picture of a given size, to count FLOPs and bytes on.

The arguments of each class of diffusers and the layout of its latents are those of its pipelines (0.42).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from cachepolicy.errors import PolicyError

ModelConfig = Mapping[str, Any]
"""The configuration of a model, as in its `config.json`."""


@dataclass(frozen=True, slots=True)
class Picture:
    """The size of what is sampled.

    Attributes:
        height: The height in pixels.
        width: The width in pixels.
        frames: The frames of a video; models of pictures ignore it.
        batch: The number of samples.
        text: The number of text tokens; None is the number that the pipeline of the class passes.
    """

    height: int = 1024
    width: int = 1024
    frames: int = 81
    batch: int = 1
    text: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """The size of the latents: samples, latent frames, height and width in cells, and text tokens."""

    batch: int
    frames: int
    height: int
    width: int
    text: int

    @property
    def cells(self) -> int:
        """The number of tokens of a packed picture or video."""
        return self.frames * self.height * self.width


Arguments = Callable[[ModelConfig, Size], dict[str, Any]]
"""Makes keyword arguments of a call."""


@dataclass(frozen=True, slots=True)
class ArgumentForm:
    """The arguments of a class.

    Attributes:
        layout: The dimensions of the latents: batch B, channels C, frames F, height H and width W, or the sequence S of
            all cells.
        text: The config field with the width of a text token; None for a class without text.
        tokens: The number of text tokens that the pipeline passes.
        pixels: The height and width of a cell in pixels.
        frames: The frames that one cell covers; None for pictures.
        latents: The argument that takes the latents; empty if `more` makes them.
        timestep: The argument that takes the timestep.
        more: Makes the other arguments; None if there are none.
    """

    layout: str
    text: str | None = None
    tokens: int = 512
    pixels: int = 8
    frames: int | None = None
    latents: str = "hidden_states"
    timestep: str = "timestep"
    more: Arguments | None = None


def example_arguments(class_name: str, config: ModelConfig, picture: Picture) -> dict[str, Any]:
    """Make the keyword arguments of one call.

    Args:
        class_name: The class of diffusers.
        config: Its configuration.
        picture: The size of the picture or video.

    Returns:
        The arguments by name, with tensors on the meta device.

    Raises:
        PolicyError: E212, the call of the class is not known.
    """
    form = FORMS.get(class_name)
    if form is None:
        raise PolicyError.of(
            "E212",
            f"how `{class_name}` is called is not known, so its FLOPs and bytes cannot be counted",
            help='give the shapes of its arguments: `--arguments FILE`, JSON such as {"hidden_states": [1, 4096, 64]}',
        )
    frames = 1 if form.frames is None else (picture.frames - 1) // form.frames + 1
    text = form.tokens if picture.text is None else picture.text
    size = Size(picture.batch, frames, picture.height // form.pixels, picture.width // form.pixels, text)
    arguments: dict[str, Any] = {form.timestep: _ones(size.batch)}
    if form.latents:
        arguments[form.latents] = _latents(form, config, size)
    if form.text is not None:
        arguments["encoder_hidden_states"] = _empty(size.batch, size.text, config[form.text])
    return arguments if form.more is None else {**arguments, **form.more(config, size)}


def arguments_from(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Make the keyword arguments of one call from shapes.

    Args:
        shapes: The arguments by name. A list of integers is the shape of a tensor; any other value is passed as it is.

    Returns:
        The arguments by name, with tensors on the meta device.

    Raises:
        PolicyError: E212, a size is negative.
    """
    return {name: _tensor(name, value) for name, value in shapes.items()}


def _tensor(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    sizes = cast("list[Any]", value)
    if not all(type(size) is int for size in sizes):
        return sizes
    if any(size < 0 for size in sizes):
        raise PolicyError.of("E212", f"`{name}` has a negative size: {sizes}")
    return _empty(*sizes)


def _latents(form: ArgumentForm, config: ModelConfig, size: Size) -> torch.Tensor:
    sizes = {
        "B": size.batch,
        "C": config["in_channels"],
        "F": size.frames,
        "H": size.height,
        "W": size.width,
        "S": size.cells,
    }
    return _empty(*(sizes[dimension] for dimension in form.layout))


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="meta")


def _mask(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool, device="meta")


# --- arguments besides latents, timestep and text ----------------------------------------------------------


def _position_ids(axes: int) -> Arguments:
    """Make position ids with `axes` axes for a packed picture and its text."""

    def more(config: ModelConfig, size: Size) -> dict[str, Any]:
        guidance = {"guidance": _ones(size.batch)} if config.get("guidance_embeds") else {}
        return {"img_ids": _empty(size.cells, axes), "txt_ids": _empty(size.text, axes), **guidance}

    return more


def _flux(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_position_ids(3)(config, size), **_pooled(config, size)}


def _chroma(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_position_ids(3)(config, size), "attention_mask": _mask(size.batch, size.text + size.cells)}


def _pooled(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {"pooled_projections": _empty(size.batch, config["pooled_projection_dim"])}


def _qwen(_config: ModelConfig, size: Size) -> dict[str, Any]:
    shapes = [[(size.frames, size.height, size.width)]] * size.batch
    return {"encoder_hidden_states_mask": _mask(size.batch, size.text), "img_shapes": shapes}


def _labels(_config: ModelConfig, size: Size) -> dict[str, Any]:
    return {"class_labels": torch.zeros(size.batch, dtype=torch.long, device="meta")}


def _text_mask(_config: ModelConfig, size: Size) -> dict[str, Any]:
    return {"encoder_attention_mask": _ones(size.batch, size.text)}


def _pixart(config: ModelConfig, size: Size) -> dict[str, Any]:
    sized = config.get("use_additional_conditions") or config.get("sample_size") == 128
    resolution, ratio = (_ones(size.batch, 2), _ones(size.batch, 1)) if sized else (None, None)
    return {**_text_mask(config, size), "added_cond_kwargs": {"resolution": resolution, "aspect_ratio": ratio}}


def _cogview(_config: ModelConfig, size: Size) -> dict[str, Any]:
    return {name: _ones(size.batch, 2) for name in ("original_size", "target_size", "crop_coords")}


def _z_image(config: ModelConfig, size: Size) -> dict[str, Any]:
    picture = [_empty(config["in_channels"], 1, size.height, size.width) for _ in range(size.batch)]
    return {"x": picture, "cap_feats": [_empty(size.text, config["cap_feat_dim"]) for _ in range(size.batch)]}


def _wan(config: ModelConfig, size: Size) -> dict[str, Any]:
    width = config.get("image_dim")
    return {} if width is None else {"encoder_hidden_states_image": _empty(size.batch, 257, width)}


def _cogvideox(config: ModelConfig, size: Size) -> dict[str, Any]:
    more: dict[str, Any] = {} if config.get("ofs_embed_dim") is None else {"ofs": _ones(1)}
    if config.get("use_rotary_positional_embeddings"):
        patch, frames = config["patch_size"], size.frames // (config.get("patch_size_t") or 1)
        tokens = frames * (size.height // patch) * (size.width // patch)
        more["image_rotary_emb"] = tuple(_empty(tokens, config["attention_head_dim"]) for _ in range(2))
    return more


def _hunyuan(config: ModelConfig, size: Size) -> dict[str, Any]:
    guidance = {"guidance": _ones(size.batch)} if config.get("guidance_embeds") else {}
    return {"encoder_attention_mask": _mask(size.batch, size.text), **_pooled(config, size), **guidance}


def _ltx(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_text_mask(config, size), "num_frames": size.frames, "height": size.height, "width": size.width}


def _sdxl(config: ModelConfig, size: Size) -> dict[str, Any]:
    if config.get("addition_embed_type") != "text_time":
        return {}
    ids = 6
    pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
    return {"added_cond_kwargs": {"text_embeds": _empty(size.batch, pooled), "time_ids": _ones(size.batch, ids)}}


FORMS: Mapping[str, ArgumentForm] = {
    "FluxTransformer2DModel": ArgumentForm("BSC", "joint_attention_dim", pixels=16, more=_flux),
    "Flux2Transformer2DModel": ArgumentForm("BSC", "joint_attention_dim", pixels=16, more=_position_ids(4)),
    "ChromaTransformer2DModel": ArgumentForm("BSC", "joint_attention_dim", pixels=16, more=_chroma),
    "QwenImageTransformer2DModel": ArgumentForm("BSC", "joint_attention_dim", pixels=16, more=_qwen),
    "SD3Transformer2DModel": ArgumentForm("BCHW", "joint_attention_dim", tokens=333, more=_pooled),
    "AuraFlowTransformer2DModel": ArgumentForm("BCHW", "joint_attention_dim", tokens=256),
    "DiTTransformer2DModel": ArgumentForm("BCHW", more=_labels),
    "PixArtTransformer2DModel": ArgumentForm("BCHW", "caption_channels", tokens=300, more=_pixart),
    "SanaTransformer2DModel": ArgumentForm("BCHW", "caption_channels", tokens=300, pixels=32, more=_text_mask),
    "CogView4Transformer2DModel": ArgumentForm("BCHW", "text_embed_dim", tokens=224, more=_cogview),
    "ZImageTransformer2DModel": ArgumentForm("BCHW", latents="", timestep="t", tokens=256, more=_z_image),
    "WanTransformer3DModel": ArgumentForm("BCFHW", "text_dim", frames=4, more=_wan),
    "CogVideoXTransformer3DModel": ArgumentForm("BFCHW", "text_embed_dim", tokens=226, frames=4, more=_cogvideox),
    "HunyuanVideoTransformer3DModel": ArgumentForm("BCFHW", "text_embed_dim", tokens=256, frames=4, more=_hunyuan),
    "LTXVideoTransformer3DModel": ArgumentForm("BSC", "caption_channels", tokens=128, pixels=32, frames=8, more=_ltx),
    "LatteTransformer3DModel": ArgumentForm("BCFHW", "caption_channels", tokens=120, frames=1),
    "UNet2DConditionModel": ArgumentForm("BCHW", "cross_attention_dim", tokens=77, latents="sample", more=_sdxl),
}
"""The classes whose arguments are known. Some other classes cannot run without data, since masks or routers read it."""
