"""Tiny image denoisers: transformers that work on one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachepolicy.testing.tiny import REVERSED_UNIT, UNIT, Arguments, Draw, Entry

if TYPE_CHECKING:
    from torch import Tensor

_FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


def _ids(draw: Draw) -> tuple[Tensor, Tensor]:
    return draw.grid(1, 4, 4), draw.grid(1, 1, 5) * 0


def _flux(draw: Draw) -> Arguments:
    image, text = _ids(draw)
    return {
        "hidden_states": draw.normal(16, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "pooled_projections": draw.normal(16),
        "img_ids": image,
        "txt_ids": text,
    }


def _flux2(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(16, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "img_ids": draw.grid(1, 4, 4, 1),
        "txt_ids": draw.grid(1, 1, 1, 5),
        "guidance": draw.full(4.0)[:, 0],
    }


def _chroma(draw: Draw) -> Arguments:
    image, text = _ids(draw)
    return {
        "hidden_states": draw.normal(16, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "img_ids": image,
        "txt_ids": text,
        "attention_mask": draw.true(21),
    }


def _sd3(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "pooled_projections": draw.normal(16),
    }


def _auraflow(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(4, 8, 8), "encoder_hidden_states": draw.normal(5, 16)}


def _qwen(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(16, 16),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_hidden_states_mask": draw.true(5),
        "img_shapes": [(1, 4, 4)] * draw.batch,
    }


def _lumina2(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_attention_mask": draw.true(5),
    }


def _dit(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(4, 8, 8), "class_labels": draw.integers(10)}


def _pixart(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_attention_mask": draw.ones(5),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sana(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_attention_mask": draw.ones(5),
    }


def _cogview(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "original_size": draw.full(64.0, 64.0),
        "target_size": draw.full(64.0, 64.0),
        "crop_coords": draw.full(0.0, 0.0),
    }


_SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}

ENTRIES = (
    Entry("flux", "FluxTransformer2DModel", {**_FLUX, "pooled_projection_dim": 16}, _flux, feed=UNIT),
    Entry(
        "flux2",
        "Flux2Transformer2DModel",
        {**_FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        _flux2,
        feed=UNIT,
    ),
    Entry(
        "chroma",
        "ChromaTransformer2DModel",
        {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        _chroma,
        feed=UNIT,
    ),
    Entry("sd3", "SD3Transformer2DModel", _SD3, _sd3, notes="the last block returns (None, hidden states)"),
    Entry(
        "sd35",
        "SD3Transformer2DModel",
        {**_SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        _sd3,
        notes="two attentions in the first blocks",
    ),
    Entry(
        "auraflow",
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "caption_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        _auraflow,
        feed=UNIT,
    ),
    Entry(
        "qwenimage",
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        _qwen,
        feed=UNIT,
    ),
    Entry(
        "lumina2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 16,
        },
        _lumina2,
        feed=REVERSED_UNIT,
        notes="two refiners run before the layers, on the picture and on the text",
    ),
    Entry(
        "dit",
        "DiTTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 3,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 4,
        },
        _dit,
        notes="learned sigma: the output has twice the channels",
    ),
    Entry(
        "pixart",
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 3,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "use_additional_conditions": False,
        },
        _pixart,
        notes="learned sigma: the output has twice the channels",
    ),
    Entry(
        "sana",
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        _sana,
    ),
    Entry(
        "cogview4",
        "CogView4Transformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 4,
            "rope_axes_dim": (16, 16),
        },
        _cogview,
    ),
)
