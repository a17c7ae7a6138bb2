"""The arguments of one denoiser call for a picture of a size, on the meta device: what FLOPs and bytes are counted on.

Which arguments a class of diffusers takes, and how it lays out its latents, was read from its pipelines (0.42).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch

from cachepolicy.errors import PolicyError

ModelConfig = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Picture:
    """What is sampled: its size in pixels, the frames of a video, and the samples in a batch.

    `text` is the number of text tokens; None stands for what the class's own pipeline gives it.
    """

    height: int = 1024
    width: int = 1024
    frames: int = 81
    batch: int = 1
    text: int | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """A picture in latent cells."""

    batch: int
    frames: int
    height: int
    width: int
    text: int

    @property
    def cells(self) -> int:
        """How many tokens a packed picture has."""
        return self.frames * self.height * self.width


More = Callable[[ModelConfig, Size], dict[str, Any]]


def _nothing(_config: ModelConfig, _size: Size) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class ArgumentForm:
    """How a class is called.

    `layout` are the dimensions of its latents: batch, channels, frames, height and width, or all cells in one sequence
    (S). `pixels` and `frames` are how many pixels and frames one cell covers, a video's where `video` says so. `text`
    is the config field with the width of a text token, `tokens` how many the pipeline gives; `more` is what else goes
    in.
    """

    layout: str
    text: str | None = None
    tokens: int = 512
    pixels: int = 8
    frames: int | None = None
    latents: str = "hidden_states"
    timestep: str = "timestep"
    more: More = _nothing


def example_arguments(class_name: str, config: ModelConfig, picture: Picture) -> dict[str, Any]:
    """The keyword arguments of one call: tensors with the right shapes and no data.

    Raises:
        PolicyError: E212, how the class is called is not known.
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
    call: dict[str, Any] = {form.timestep: _ones(size.batch)}
    if form.latents:
        call[form.latents] = _latents(form, config, size)
    if form.text is not None:
        call["encoder_hidden_states"] = _empty(size.batch, size.text, config[form.text])
    return {**call, **form.more(config, size)}


def arguments_from(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments whose shapes were given: a list of sizes is a tensor, anything else stands for itself.

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
    return _empty(*(sizes[each] for each in form.layout))


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="meta")


def _mask(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool, device="meta")


# --- what classes take besides latents, timestep and text --------------------------------------------------


def _places(axes: int) -> More:
    """Position ids of a packed picture and its text."""

    def more(config: ModelConfig, size: Size) -> dict[str, Any]:
        guidance = {"guidance": _ones(size.batch)} if config.get("guidance_embeds") else {}
        return {"img_ids": _empty(size.cells, axes), "txt_ids": _empty(size.text, axes), **guidance}

    return more


def _flux(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_places(3)(config, size), **_pooled(config, size)}


def _chroma(config: ModelConfig, size: Size) -> dict[str, Any]:
    return {**_places(3)(config, size), "attention_mask": _mask(size.batch, size.text + size.cells)}


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
    "Flux2Transformer2DModel": ArgumentForm("BSC", "joint_attention_dim", pixels=16, more=_places(4)),
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
"""The classes whose calls are known. Some others cannot run without data: their masks or routers read it."""
