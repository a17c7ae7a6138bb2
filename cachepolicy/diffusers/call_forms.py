"""How denoisers of diffusers are called: the arguments of one call, as shapes.

The argument names, the layouts of the latents and the numbers of text tokens were read from the pipelines of diffusers
0.42.1. `cachepolicy.tools.example_inputs` makes tensors of them, on which FLOPs and bytes are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

ModelConfig = Mapping[str, Any]
"""The configuration of a model, as in its `config.json`."""


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a sample in latent cells, and the number of text tokens."""

    batch: int
    frames: int
    height: int
    width: int
    text: int

    @property
    def cells(self) -> int:
        """The number of tokens of a packed sample."""
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor argument without data."""

    sizes: tuple[int, ...]
    dtype: Literal["float32", "int64", "bool"] = "float32"


Arguments = Callable[[ModelConfig, Size], dict[str, Any]]
"""Gives the further arguments of a call. Values that are no `Shape` are passed as they are."""


@dataclass(frozen=True, slots=True)
class ArgumentForm:
    """How a class is called.

    Attributes:
        layout: The dimensions of its latents: batch (B), channels (C), frames (F), height (H) and width (W), or all
            cells in one sequence (S).
        text: The config field with the width of a text token, or None if the class takes no text.
        tokens: The number of text tokens that its pipeline passes.
        pixels: The number of pixels per cell, in height and width.
        frames: The number of frames per cell of a video, or None for images.
        latents: The name of the latents argument, or "" if `more` gives it.
        timestep: The name of the timestep argument.
        more: Gives the further arguments, or None if there are none.
    """

    layout: str
    text: str | None = None
    tokens: int = 512
    pixels: int = 8
    frames: int | None = None
    latents: str = "hidden_states"
    timestep: str = "timestep"
    more: Arguments | None = None


# --- further arguments -----------------------------------------------------------------------------------


def _floats(*sizes: int) -> Shape:
    return Shape(sizes)


def _mask(*sizes: int) -> Shape:
    return Shape(sizes, "bool")


def _positions(axes: int) -> Arguments:
    """Position ids of a packed image and its text."""

    def more(config: ModelConfig, size: Size) -> dict[str, Any]:
        guidance = {"guidance": _floats(size.batch)} if config.get("guidance_embeds") else {}
        return {"img_ids": _floats(size.cells, axes), "txt_ids": _floats(size.text, axes), **guidance}

    return more


def _flux(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_positions(3)(config, size), **_pooled(config, size)}


def _chroma(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_positions(3)(config, size), "attention_mask": _mask(size.batch, size.text + size.cells)}


def _pooled(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {"pooled_projections": _floats(size.batch, config["pooled_projection_dim"])}


def _qwen(_config: ModelConfig, size: Size) -> dict[str, Any]:
    shapes = [[(size.frames, size.height, size.width)]] * size.batch
    return {"encoder_hidden_states_mask": _mask(size.batch, size.text), "img_shapes": shapes}


def _labels(_config: ModelConfig, size: Size) -> dict[str, Any]:
    return {"class_labels": Shape((size.batch,), "int64")}


def _text_mask(_config: ModelConfig, size: Size) -> dict[str, Any]:
    return {"encoder_attention_mask": _floats(size.batch, size.text)}


def _pixart(config: ModelConfig, size: Size) -> dict[str, Any]:
    sized = config.get("use_additional_conditions") or config.get("sample_size") == 128
    resolution, ratio = (_floats(size.batch, 2), _floats(size.batch, 1)) if sized else (None, None)
    return {**_text_mask(config, size), "added_cond_kwargs": {"resolution": resolution, "aspect_ratio": ratio}}


def _cogview(_config: ModelConfig, size: Size) -> dict[str, Any]:
    return {name: _floats(size.batch, 2) for name in ("original_size", "target_size", "crop_coords")}


def _z_image(config: ModelConfig, size: Size) -> dict[str, Any]:
    picture = [_floats(config["in_channels"], 1, size.height, size.width) for _ in range(size.batch)]
    return {"x": picture, "cap_feats": [_floats(size.text, config["cap_feat_dim"]) for _ in range(size.batch)]}


def _wan(config: ModelConfig, size: Size) -> dict[str, Any]:
    width = config.get("image_dim")
    return {} if width is None else {"encoder_hidden_states_image": _floats(size.batch, 257, width)}


def _cogvideox(config: ModelConfig, size: Size) -> dict[str, Any]:
    more: dict[str, Any] = {} if config.get("ofs_embed_dim") is None else {"ofs": _floats(1)}
    if config.get("use_rotary_positional_embeddings"):
        patch, frames = config["patch_size"], size.frames // (config.get("patch_size_t") or 1)
        tokens = frames * (size.height // patch) * (size.width // patch)
        more["image_rotary_emb"] = tuple(_floats(tokens, config["attention_head_dim"]) for _ in range(2))
    return more


def _hunyuan(config: ModelConfig, size: Size) -> dict[str, Any]:
    guidance = {"guidance": _floats(size.batch)} if config.get("guidance_embeds") else {}
    return {"encoder_attention_mask": _mask(size.batch, size.text), **_pooled(config, size), **guidance}


def _ltx(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_text_mask(config, size), "num_frames": size.frames, "height": size.height, "width": size.width}


def _sdxl(config: ModelConfig, size: Size) -> dict[str, Any]:
    if config.get("addition_embed_type") != "text_time":
        return {}
    ids = 6
    pooled = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
    return {"added_cond_kwargs": {"text_embeds": _floats(size.batch, pooled), "time_ids": _floats(size.batch, ids)}}


FORMS: Mapping[str, ArgumentForm] = {
    "FluxTransformer2DModel": ArgumentForm("BSC", "joint_attention_dim", pixels=16, more=_flux),
    "Flux2Transformer2DModel": ArgumentForm("BSC", "joint_attention_dim", pixels=16, more=_positions(4)),
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
"""The call forms by class name. The classes come from diffusers' own configurations, so the name is enough.

Some other classes cannot run on the meta device: their masks or routers read data.
"""
