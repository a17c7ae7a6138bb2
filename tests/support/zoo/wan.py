"""Tiny video denoisers of the Wan family: self and cross attention in each block, text in cross attention only."""

from __future__ import annotations

from tests.support.zoo.entry import Arguments, Draw, Entry, Feed

_LATENT = (4, 2, 8, 8)

_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}
_PICTURE = {"image_dim": 8, "added_kv_proj_dim": 24}


def _text(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(*_LATENT), "encoder_hidden_states": draw.normal(5, 16)}


def _picture(draw: Draw) -> Arguments:
    # The cross attention splits at a fixed number of text tokens from the end.
    return {
        "hidden_states": draw.normal(*_LATENT),
        "encoder_hidden_states": draw.normal(512, 16),
        "encoder_hidden_states_image": draw.normal(3, 8),
    }


def _control(draw: Draw) -> Arguments:
    return {**_text(draw), "control_hidden_states": draw.normal(6, 2, 8, 8)}


def _animate(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(12, 3, 8, 8),
        "encoder_hidden_states": draw.normal(512, 16),
        "encoder_hidden_states_image": draw.normal(3, 8),
        "pose_hidden_states": draw.normal(4, 2, 8, 8),
        "face_pixel_values": draw.normal(3, 5, 16, 16),
    }


def _per_frame(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(5, 16)}


def _helios(draw: Draw) -> Arguments:
    import torch

    frames = torch.arange(12).expand(draw.batch, -1)
    return {
        **_text(draw),
        "indices_hidden_states": frames[:, 10:12],
        "indices_latents_history_short": frames[:, 8:10],
        "indices_latents_history_mid": frames[:, 6:8],
        "indices_latents_history_long": frames[:, 2:6],
        "latents_history_short": draw.normal(4, 2, 8, 8),
        "latents_history_mid": draw.normal(4, 2, 8, 8),
        "latents_history_long": draw.normal(4, 4, 8, 8),
    }


_WITHOUT_NORM_KIND = {key: value for key, value in _WAN.items() if key != "qk_norm"}

ENTRIES = (
    Entry("wan", "WanTransformer3DModel", _WAN, _text, cross=r"attn2$"),
    Entry(
        "wan_i2v",
        "WanTransformer3DModel",
        {**_WAN, **_PICTURE},
        _picture,
        notes="cross attention to a picture beside the text",
        cross=r"attn2$",
    ),
    Entry(
        "wan_vace",
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0, 2], "vace_in_channels": 6},
        _control,
        notes="blocks of their own for a control, whose outputs are added between the main blocks",
        cross=r"attn2$",
    ),
    Entry(
        "wan_animate",
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
            **_PICTURE,
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4, "16": 4},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
            "num_layers": 4,
        },
        _animate,
        notes="a face's cross attention works between the blocks; the input has more channels than the output",
        cross=r"attn2$|^face_adapter",
    ),
    Entry("skyreels_v2", "SkyReelsV2Transformer3DModel", _WAN, _text, cross=r"attn2$"),
    Entry(
        "chronoedit",
        "ChronoEditTransformer3DModel",
        {**_WAN, **_PICTURE, "rope_temporal_skip_len": 2},
        _picture,
        notes="a block class of its own with the name of Wan's",
        cross=r"attn2$",
    ),
    Entry(
        "anyflow",
        "AnyFlowTransformer3DModel",
        _WITHOUT_NORM_KIND,
        _per_frame,
        feed=Feed(shape="frames", also=("r_timestep",)),
        notes="one timestep a frame; cross attention carries no mark of it",
        cross=r"attn2$",
    ),
    Entry(
        "helios",
        "HeliosTransformer3DModel",
        {**{key: value for key, value in _WAN.items() if key != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        _helios,
        notes="history frames are tokens before the frames to be sampled",
        cross=r"attn2$",
    ),
)
