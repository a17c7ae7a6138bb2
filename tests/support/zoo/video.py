"""Tiny video denoisers."""

from __future__ import annotations

from tests.support.zoo.entry import Arguments, Draw, Entry, Feed, embedding

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

    *frequencies, t, h, w = embedding("get_3d_rotary_pos_embed_allegro")(
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


def _cogvideox15(draw: Draw) -> Arguments:
    rotary = embedding("get_3d_rotary_pos_embed")(16, None, (4, 4), 1, grid_type="slice", max_size=(4, 4))
    return {**_cogvideox(draw), "ofs": draw.full(2.0)[:, 0], "image_rotary_emb": rotary}


def _consisid(draw: Draw) -> Arguments:
    return {
        **_cogvideox(draw),
        "id_cond": draw.normal(4),
        "id_vit_hidden": [draw.normal(2, 8) for _ in range(5)],
    }


def _hunyuan_plain(draw: Draw) -> Arguments:
    return {**_masked(draw), "pooled_projections": draw.normal(8)}


def _hunyuan15(draw: Draw) -> Arguments:
    return {
        **_masked(draw),
        "encoder_hidden_states_2": draw.normal(3, 8),
        "encoder_attention_mask_2": draw.true(3),
        "image_embeds": draw.normal(2, 8) * 0,
    }


def _framepack(draw: Draw) -> Arguments:
    import torch

    frames = torch.arange(16)
    return {
        **_hunyuan(draw),
        "image_embeds": draw.normal(3, 8),
        "indices_latents": frames[14:16],
        "latents_clean": draw.normal(4, 2, 8, 8),
        "indices_latents_clean": frames[[0, 13]],
        "latents_history_2x": draw.normal(4, 2, 8, 8),
        "indices_latents_history_2x": frames[11:13],
        "latents_history_4x": draw.normal(4, 4, 8, 8),
        "indices_latents_history_4x": frames[7:11],
    }


def _ltx2(draw: Draw) -> Arguments:
    return {
        **_ltx(draw),
        "audio_hidden_states": draw.normal(4, 4),
        "audio_encoder_hidden_states": draw.normal(5, 16),
        "audio_encoder_attention_mask": draw.true(5),
        "audio_num_frames": 4,
    }


def _cosmos(draw: Draw) -> Arguments:
    return {**_text_to_video(draw), "fps": 30}


def _kandinsky(draw: Draw) -> Arguments:
    import torch

    return {
        "hidden_states": draw.normal(2, 8, 8, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "pooled_projections": draw.normal(8),
        "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
        "text_rope_pos": torch.arange(5),
    }


def _kandinsky6(draw: Draw) -> Arguments:
    return {
        "hidden_states": draw.normal(2, 8, 8, 4),
        "audio_hidden_states": draw.normal(4, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "pooled_projections": draw.normal(8),
    }


def _minimax(draw: Draw) -> Arguments:
    import torch

    # Rows: 5 of text, clean, then 16 of video and 4 of audio at the noise level of the step.
    return {
        "hidden_states": draw.normal(16, 8),
        "audio_hidden_states": draw.normal(4, 4),
        "encoder_hidden_states": draw.normal(5, 16),
        "timestep_indices": torch.tensor([1] * 5 + [0] * 20),
        "token_tags": torch.tensor([1] * 5 + [0] * 16 + [2] * 4),
        "position_ids": torch.cat([draw.grid(1, 1, 5), draw.grid(1, 4, 4), draw.grid(4, 1, 1)]),
        "text_indices": torch.arange(5),
        "video_indices": torch.arange(5, 21),
        "audio_indices": torch.arange(21, 25),
    }


def _cosmos3(draw: Draw) -> Arguments:
    import torch

    length = 5 + 32
    return {
        "input_ids": draw.integers(32, 5)[0],
        "text_indexes": torch.arange(5),
        "position_ids": torch.arange(length).expand(3, -1),
        "und_len": 5,
        "sequence_length": length,
        "vision_tokens": [draw.free(1, 4, 2, 8, 8)],
        "vision_token_shapes": [(2, 4, 4)],
        "vision_sequence_indexes": torch.arange(5, length),
        "vision_mse_loss_indexes": torch.arange(5, length),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


_COGVIDEOX = {
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
}
_HUNYUAN = {
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
}

ENTRIES = (
    Entry(
        "cogvideox",
        "CogVideoXTransformer3DModel",
        _COGVIDEOX,
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
        cross=r"attn2$",
    ),
    Entry(
        "hunyuan_video",
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN,
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
        cross=r"attn2$",
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
        cross=r"attn2$",
    ),
    Entry(
        "cogvideox15",
        "CogVideoXTransformer3DModel",
        {
            **_COGVIDEOX,
            "attention_head_dim": 16,
            "patch_size_t": 2,
            "patch_bias": False,
            "ofs_embed_dim": 8,
            "use_rotary_positional_embeddings": True,
        },
        _cogvideox15,
        notes="version 1.5: rotary embeddings, patches in time",
    ),
    Entry(
        "consisid",
        "ConsisIDTransformer3DModel",
        {
            **_COGVIDEOX,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 4,
            "LFE_vit_dim": 8,
            "LFE_depth": 5,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 5,
        },
        _consisid,
        notes="a face's cross attention, outside diffusers' attention classes, works between the blocks",
    ),
    Entry(
        "hunyuan_video_token_replace",
        "HunyuanVideoTransformer3DModel",
        {**_HUNYUAN, "guidance_embeds": False, "image_condition_type": "token_replace"},
        _hunyuan_plain,
        notes="picture to video: the first frame's tokens are modulated apart",
    ),
    Entry(
        "hunyuan_video15",
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 8,
            "task_type": "t2v",
        },
        _hunyuan15,
        notes="three texts, of two encoders and a picture, are put in order by their masks",
    ),
    Entry(
        "hunyuan_framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        {**_HUNYUAN, "patch_size": 2, "has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        _framepack,
        notes="history frames are tokens before the frames to be sampled",
    ),
    Entry(
        "ltx2",
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        },
        _ltx2,
        feed=Feed(also=("sigma",)),
        notes="video and audio streams with cross attention both ways, which carries no mark of it",
        cross=r"attn2$|_to_\w+_attn$",
    ),
    Entry(
        "cosmos",
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 3,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "extra_pos_embed_type": "learnable",
            "concat_padding_mask": False,
        },
        _cosmos,
        notes="pipelines feed functions of sigma that are no timesteps",
        cross=r"attn2$",
    ),
    Entry(
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 3,
            "mmdit_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "patch_size": 2,
        },
        _text_to_video,
        notes="the last block shares its weights between text and video",
    ),
    Entry(
        "sana_video",
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        _text_to_video,
        notes="linear attention",
        cross=r"attn2$",
    ),
    Entry(
        "kandinsky5",
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 3,
            "axes_dims": (4, 6, 6),
        },
        _kandinsky,
        notes="channels last; cross attention carries no mark of it",
        cross=r"cross_attention$",
    ),
    Entry(
        "kandinsky6",
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        _kandinsky6,
        notes="video and audio streams; cross attention carries no mark of it",
        cross=r"cross_attention$",
    ),
    Entry(
        "motif_video",
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (2, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _masked,
        cross=r"cross_attn$",
    ),
    Entry(
        "minimax_h3",
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 2,
            "audio_in_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax,
        feed=Feed(scale=1e-3, reverse=True, shape="rows", tail=(1.0,)),
        notes="the timestep argument lists the noise levels of the rows, clean ones among them",
    ),
    Entry(
        "cosmos3",
        "Cosmos3OmniTransformer",
        {
            "dtype": "float32",
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 32,
            "latent_channel": 4,
            "latent_patch_size": 2,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "vocab_size": 32,
            "rope_scaling": {"mrope_section": [4, 2, 2]},
        },
        _cosmos3,
        latent="vision_tokens",
        feed=Feed("vision_timesteps", shape="rows", rows=32),
        batches=False,
        notes="one packed sequence without a batch; two streams, und and gen",
    ),
)
