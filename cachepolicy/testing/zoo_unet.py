"""Tiny UNets."""

from __future__ import annotations

from cachepolicy.testing.tiny import Arguments, Draw, Entry


def _condition(draw: Draw) -> Arguments:
    return {"sample": draw.normal(4, 8, 8), "encoder_hidden_states": draw.normal(5, 8)}


ENTRIES = (
    Entry(
        "unet2d_condition",
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
        },
        _condition,
        latent="sample",
    ),
)
