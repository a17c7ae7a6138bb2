"""Tiny UNets."""

from __future__ import annotations

from tests.support.zoo.entry import Arguments, Draw, Entry, Feed


def _plain(draw: Draw) -> Arguments:
    return {"sample": draw.normal(4, 8, 8)}


def _condition(draw: Draw) -> Arguments:
    return {**_plain(draw), "encoder_hidden_states": draw.normal(5, 8)}


def _frames(draw: Draw) -> Arguments:
    return {"sample": draw.normal(4, 2, 8, 8), "encoder_hidden_states": draw.normal(5, 8)}


def _motion(draw: Draw) -> Arguments:
    # Frames are samples of the spatial layers: the pipeline repeats the text for each.
    return {
        "sample": draw.normal(4, 2, 8, 8),
        "encoder_hidden_states": draw.normal(5, 8).repeat_interleave(2, dim=0),
    }


def _masked(draw: Draw) -> Arguments:
    return {**_condition(draw), "encoder_attention_mask": draw.ones(5)}


def _svd(draw: Draw) -> Arguments:
    return {
        "sample": draw.normal(2, 8, 8, 8),
        "encoder_hidden_states": draw.normal(1, 8),
        "added_time_ids": draw.full(6.0, 127.0, 0.02),
    }


def _i2vgen(draw: Draw) -> Arguments:
    return {
        **_frames(draw),
        "fps": draw.full(16.0)[:, 0],
        "image_latents": draw.normal(4, 2, 8, 8),
        "image_embeddings": draw.normal(1, 8),
    }


def _cascade(draw: Draw) -> Arguments:
    return {
        "sample": draw.normal(4, 8, 8),
        "clip_text_pooled": draw.normal(1, 8),
        "clip_text": draw.normal(5, 8),
        "clip_img": draw.normal(1, 8),
    }


_LEVELS = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
}

ENTRIES = (
    Entry(
        "unet2d_condition",
        "UNet2DConditionModel",
        {
            **_LEVELS,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
        },
        _condition,
        latent="sample",
        cross=r"attn2$",
    ),
    Entry(
        "unet2d",
        "UNet2DModel",
        {
            **_LEVELS,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "attention_head_dim": 4,
        },
        _plain,
        latent="sample",
        notes="no conditioning",
    ),
    Entry(
        "unet3d",
        "UNet3DConditionModel",
        {
            **_LEVELS,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
        },
        _frames,
        latent="sample",
        notes="temporal attention in transformers of its own",
        cross=r"(?<!temp_)attentions\.\d+\.transformer_blocks\.\d+\.attn2$",
    ),
    Entry(
        "unet_motion",
        "UNetMotionModel",
        {
            **_LEVELS,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "motion_max_seq_length": 4,
        },
        _motion,
        latent="sample",
        notes="temporal attention in motion modules; their attn2 is self attention",
        cross=r"(?<!temp_)attentions\.\d+\.transformer_blocks\.\d+\.attn2$",
    ),
    Entry(
        "unet_spatiotemporal",
        "UNetSpatioTemporalConditionModel",
        {
            **_LEVELS,
            "in_channels": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_frames": 2,
        },
        _svd,
        latent="sample",
        notes="its pipeline feeds a function of sigma that is no timestep; the input holds a picture's channels too",
        cross=r"attn2$",
    ),
    Entry(
        "unet_kandinsky3",
        "Kandinsky3UNet",
        {
            "in_channels": 4,
            "time_embedding_dim": 8,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (8, 16),
            "cross_attention_dim": 8,
            "encoder_hid_dim": 8,
        },
        _masked,
        latent="sample",
        notes="self attention that calls itself cross attention",
        cross=r"attention$",
    ),
    Entry(
        "unet_i2vgen",
        "I2VGenXLUNet",
        {
            **_LEVELS,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "norm_num_groups": 2,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
        },
        _i2vgen,
        latent="sample",
        cross=r"(?<!temp_)attentions\.\d+\.transformer_blocks\.\d+\.attn2$",
    ),
    Entry(
        "unet_cascade",
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (8, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "clip_text_in_channels": 8,
            "clip_text_pooled_in_channels": 8,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
        },
        _cascade,
        latent="sample",
        feed=Feed("timestep_ratio", 1e-3),
        notes="the ratio is a function of the noise level, close to t / 1000",
    ),
)
