"""Tiny image denoisers: transformers that work on one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.zoo.entry import REVERSED_UNIT, UNIT, Arguments, Draw, Entry, Feed, embedding

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


def _lumina_next(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 32),
        "encoder_mask": draw.ones(5),
        "image_rotary_emb": embedding("get_2d_rotary_pos_embed_lumina")(8, 8, 8),
        "cross_attention_kwargs": {},
    }


def _z_image(draw: Draw) -> Arguments:
    return {
        "x": [draw.free(4, 1, 8, 8) for _ in range(draw.batch)],
        "cap_feats": [draw.free(5, 16) for _ in range(draw.batch)],
    }


def _fibo2(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(4, 8, 8), "encoder_hidden_states": draw.normal(2, 5, 16)}


def _hunyuan_dit(draw: Draw) -> Arguments:
    rotary = embedding("get_2d_rotary_pos_embed")(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 8),
        "text_embedding_mask": draw.ones(5),
        "encoder_hidden_states_t5": draw.normal(5, 8),
        "text_embedding_mask_t5": draw.ones(5),
        "image_rotary_emb": rotary,
    }


def _omnigen(draw: Draw) -> Arguments:
    import torch

    # Five text tokens, the step's token, and 16 picture tokens that all see each other.
    length = 5 + 1 + 16
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "input_ids": draw.integers(32, 5),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": draw.ones(length, length),
        "position_ids": torch.arange(length).expand(draw.batch, -1),
    }


def _ernie(draw: Draw) -> Arguments:
    import torch

    return {
        "hidden_states": draw.normal(4, 4, 4),
        "text_bth": draw.normal(5, 16),
        "text_lens": torch.full((draw.batch,), 5),
    }


def _prior(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(16),
        "proj_embedding": draw.normal(16),
        "encoder_hidden_states": draw.normal(5, 16),
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
        cross=r"attn2$",
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
        cross=r"attn2$",
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
    Entry(
        "lumina_next",
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "cross_attention_dim": 32,
        },
        _lumina_next,
        feed=REVERSED_UNIT,
        cross=r"attn2$",
    ),
    Entry(
        "z_image",
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 4, 8],
            "axes_lens": [64, 8, 8],
        },
        _z_image,
        latent="x",
        feed=Feed("t", 1e-3, reverse=True),
        notes="latents, texts and predictions are lists of samples; two refiners run before the layers",
    ),
    Entry(
        "bria_fibo2",
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 32,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 4, 8),
            "axes_lens": (64, 8, 8),
        },
        _fibo2,
        feed=UNIT,
        notes="a perceiver shortens the text first; one layer has cross attention, which carries no mark of it",
        cross=r"cross_attention$",
    ),
    Entry(
        "hunyuan_dit",
        "HunyuanDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "hidden_size": 16,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "text_len": 5,
            "text_len_t5": 5,
            "use_style_cond_and_image_meta_size": False,
            "activation_fn": "gelu-approximate",
        },
        _hunyuan_dit,
        notes="long skips from the first half to the second; learned sigma",
        cross=r"attn2$",
    ),
    Entry(
        "omnigen",
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 32,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        _omnigen,
        feed=REVERSED_UNIT,
        notes="self attention that calls itself cross attention",
    ),
    Entry(
        "ernie_image",
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_axes_dim": (4, 4, 8),
        },
        _ernie,
        notes="hidden states are (tokens, batch, channels)",
    ),
    Entry(
        "prx",
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 3,
            "axes_dim": [8, 8],
        },
        _auraflow,
        feed=UNIT,
    ),
    Entry(
        "prior",
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "embedding_dim": 16,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        _prior,
        notes="predicts an image embedding, which is one token among others",
    ),
)
