"""Tiny video denoisers."""

from __future__ import annotations

from cachepolicy.testing.tiny import Arguments, Draw, Entry, Feed

_LATENT = (4, 2, 8, 8)


def _text_to_video(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(*_LATENT), "encoder_hidden_states": draw.normal(5, 16)}


def _masked(draw: Draw) -> Arguments:
    return {**_text_to_video(draw), "encoder_attention_mask": draw.true(5)}


def _cogvideox(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(2, 4, 8, 8), "encoder_hidden_states": draw.normal(5, 16)}


def _hunyuan(draw: Draw) -> Arguments:
    return {
        **_masked(draw),
        "pooled_projections": draw.normal(8),
        "guidance": draw.full(6000.0)[:, 0],
    }


def _ltx(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(2 * 4 * 4, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_attention_mask": draw.true(5),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def _allegro(draw: Draw) -> Arguments:
    import torch
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *frequencies, t, h, w = get_3d_rotary_pos_embed_allegro(
        embed_dim=12, crops_coords=((0, 0), (4, 4)), grid_size=(4, 4), temporal_size=2
    )
    places = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1)
    return {
        "hidden_states": draw.normal(*_LATENT),
        "encoder_hidden_states": draw.normal(5, 16),
        "encoder_attention_mask": draw.ones(5),
        "attention_mask": draw.ones(2, 8, 8),
        "image_rotary_emb": (tuple(frequencies), tuple(places)),
    }


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

ENTRIES = (
    Entry(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 3,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 5,
        },
        _cogvideox,
    ),
    Entry(
        "latte",
        "LatteTransformer3DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 16,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "num_embeds_ada_norm": 1000,
            "video_length": 2,
        },
        _text_to_video,
        notes="a spatial and a temporal block in turn, with reshapes between",
    ),
    Entry("wan", "WanTransformer3DModel", _WAN, _text_to_video),
    Entry(
        "hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        _hunyuan,
        notes="a text refiner runs before the blocks",
    ),
    Entry(
        "ltx",
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": 16,
        },
        _ltx,
        notes="cross attention carries no mark of it",
    ),
    Entry(
        "mochi",
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "time_embed_dim": 4,
            "text_embed_dim": 16,
            "max_sequence_length": 16,
        },
        _masked,
        feed=Feed(reverse=True),
    ),
    Entry(
        "allegro",
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "cross_attention_dim": 24,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 2,
            "caption_channels": 16,
        },
        _allegro,
    ),
)
