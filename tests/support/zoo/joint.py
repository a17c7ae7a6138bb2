"""More tiny image denoisers with joint attention: text and picture tokens in one sequence."""

from __future__ import annotations

from tests.support.zoo.entry import RAW, UNIT, Arguments, Draw, Entry, Feed

_STREAMS = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


def _tokens(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(16, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "img_ids": draw.grid(1, 4, 4),
        "txt_ids": draw.grid(1, 1, 5) * 0,
    }


def _fibo(draw: Draw) -> Arguments:
    layers = [draw.normal(5, 16) for _ in range(4)]
    return {**_tokens(draw), "text_encoder_layers": layers}


def _flux3(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(16, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "img_ids": draw.grid(1, 4, 4, 1),
        "txt_ids": draw.grid(1, 1, 1, 5),
    }


def _qwen21(draw: Draw) -> Arguments:
    import torch

    # Four slots at the end stand for the 4x4 target tokens, four tokens each.
    slots = torch.zeros(draw.batch, 9, dtype=torch.bool)
    slots[:, 5:] = True
    return {
        "hidden_states": draw.normal(16, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "img_shapes": [[(1, 4, 4)]] * draw.batch,
        "img_mask": slots,
    }


def _nucleus(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(16, 16),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_hidden_states_mask": draw.true(5),
        "img_shapes": [(1, 4, 4)] * draw.batch,
    }


def _hidream(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states_t5": draw.normal(5, 16),
        "encoder_hidden_states_llama3": draw.free(2, draw.batch, 5, 16),
        "pooled_embeds": draw.normal(8),
    }


def _cogview3(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "original_size": draw.full(64.0, 64.0),
        "target_size": draw.full(64.0, 64.0),
        "crop_coords": draw.full(0.0, 0.0),
    }


def _glm(draw: Draw) -> Arguments:
    import torch

    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "prior_token_id": draw.integers(16, 16),
        "prior_token_drop": torch.zeros(draw.batch, 16, dtype=torch.bool),
        "target_size": draw.full(64.0, 64.0),
        "crop_coords": draw.full(0.0, 0.0),
    }


def _hunyuan_image(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8, 8),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_attention_mask": draw.true(5),
    }


def _joyimage(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(4, 1, 8, 8), "encoder_hidden_states": draw.normal(5, 16)}


def _krea(draw: Draw) -> Arguments:
    import torch

    return {
        "hidden_states": draw.normal(16, 4),
        "encoder_hidden_states": draw.normal(5, 2, 16),
        "position_ids": torch.cat([torch.zeros(5, 3), draw.grid(1, 4, 4)]),
    }


def _ideogram(draw: Draw) -> Arguments:
    import torch
    from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR

    roles = torch.tensor([LLM_TOKEN_INDICATOR] * 5 + [OUTPUT_IMAGE_INDICATOR] * 16)
    places = torch.cat([draw.grid(1, 1, 5).flip(1), draw.grid(1, 4, 4, start=5)]).long()
    return {
        "hidden_states": draw.normal(21, 4),
        "encoder_hidden_states": draw.normal(21, 16),
        "position_ids": places.expand(draw.batch, -1, -1),
        "segment_ids": torch.zeros(draw.batch, 21, dtype=torch.long),
        "indicator": roles.expand(draw.batch, -1),
    }


ENTRIES = (
    Entry("bria", "BriaTransformer2DModel", _STREAMS, _tokens),
    Entry(
        "bria_fibo",
        "BriaFiboTransformer2DModel",
        {**_STREAMS, "text_encoder_dim": 16},
        _fibo,
        notes="a text encoder's layer is mixed in before each block",
    ),
    Entry("longcat_image", "LongCatImageTransformer2DModel", _STREAMS, _tokens, feed=UNIT),
    Entry("ovis_image", "OvisImageTransformer2DModel", {**_STREAMS, "out_channels": 4}, _tokens, feed=UNIT),
    Entry(
        "flux3",
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        _flux3,
        feed=UNIT,
        notes="text and picture have blocks of their own before the joint ones; no reference picture here",
    ),
    Entry(
        "qwenimage21",
        "QwenImage21Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (4, 4, 8),
        },
        _qwen21,
        feed=UNIT,
        notes="one sequence; text does not depend on the step",
    ),
    Entry(
        "nucleusmoe",
        "NucleusMoEImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 4, 8),
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
            "dense_moe_strategy": "leave_first_block_dense",
        },
        _nucleus,
        feed=UNIT,
        notes="mixture of experts",
    ),
    Entry(
        "hidream",
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [16, 16],
            "text_emb_dim": 8,
            "axes_dims_rope": (4, 4, 8),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1, 0, 1),
            "force_inference_output": True,
        },
        _hidream,
        feed=Feed("timesteps"),
        notes="mixture of experts; a text encoder's layer is mixed in before each block",
    ),
    Entry(
        "cogview3plus",
        "CogView3PlusTransformer2DModel",
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
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        _cogview3,
    ),
    Entry(
        "glm_image",
        "GlmImageTransformer2DModel",
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
            "prior_vq_quantizer_codebook_size": 16,
        },
        _glm,
        notes="its pipeline feeds t - 1",
    ),
    Entry(
        "hunyuan_image",
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": (2, 2),
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4),
        },
        _hunyuan_image,
        notes="a text refiner runs before the blocks",
    ),
    Entry(
        "joyimage",
        "JoyImageEditTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 3,
            "rope_dim_list": [4, 6, 6],
        },
        _joyimage,
        feed=RAW,
    ),
    Entry(
        "krea2",
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 4, 8),
        },
        _krea,
        feed=UNIT,
        notes="text blocks run before the joint ones and do not depend on the step",
    ),
    Entry(
        "ideogram4",
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "mrope_section": (4, 2, 2),
        },
        _ideogram,
        feed=Feed(scale=1e-3, reverse=True),
        notes="text and picture share one sequence; only picture rows of the output mean something",
    ),
)
