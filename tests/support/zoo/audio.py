"""Tiny audio denoisers."""

from __future__ import annotations

from tests.support.zoo.entry import REVERSED_UNIT, UNIT, Arguments, Draw, Entry, Feed, embedding


def _stable_audio(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8),
        "encoder_hidden_states": draw.normal(5, 8),
        "global_hidden_states": draw.normal(1, 8),
        "rotary_embedding": embedding("get_1d_rotary_pos_embed")(4, 9, use_real=True, repeat_interleave_real=False),
    }


def _stable_audio3(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(4, 8),
        "encoder_hidden_states": draw.normal(5, 8),
        "global_hidden_states": draw.normal(8),
        "local_add_cond": draw.normal(5, 8),
    }


def _ace_step(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(8, 4),
        "encoder_hidden_states": draw.normal(5, 32),
        "context_latents": draw.normal(8, 8),
    }


def _longcat(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(8, 4),
        "encoder_hidden_states": draw.normal(5, 8),
        "encoder_attention_mask": draw.true(5),
        "attention_mask": draw.true(8),
        "latent_cond": draw.normal(8, 4),
    }


def _music3(draw: Draw) -> Arguments:
    return {"hidden_states": draw.normal(4, 8), "encoder_hidden_states": draw.normal(8, 8)}


ENTRIES = (
    Entry(
        "stable_audio",
        "StableAudioDiTModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        _stable_audio,
        feed=UNIT,
        cross=r"attn2$",
    ),
    Entry(
        "stable_audio3",
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 16,
            "depth": 3,
            "num_heads": 2,
            "cond_token_dim": 8,
            "global_cond_dim": 8,
            "local_add_cond_dim": 5,
            "timestep_features_dim": 8,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        _stable_audio3,
        feed=UNIT,
        notes="differential attention",
        cross=r"cross_attn$",
    ),
    Entry(
        "ace_step",
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "patch_size": 2,
            "sliding_window": 4,
        },
        _ace_step,
        feed=Feed(scale=1e-3, also=("timestep_r",)),
        cross=r"cross_attn$",
    ),
    Entry(
        "longcat_audio",
        "LongCatAudioDiTTransformer",
        {"dit_dim": 16, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 8, "latent_dim": 4, "ff_mult": 2.0},
        _longcat,
        feed=REVERSED_UNIT,
        notes="a long skip from the first block to the end; cross attention carries no mark of it",
        cross=r"cross_attn$",
    ),
    Entry(
        "minimax_music3",
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 4,
            "condition_dim": 8,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 16,
        },
        _music3,
        feed=Feed(scale=1e-3, reverse=True),
        notes="the step is a token of the sequence",
    ),
)
