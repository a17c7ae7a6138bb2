"""Saves a tiny pipeline with random weights, as engines load it: `python save_tiny.py sd3|flux|wan FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CHARACTERS = [chr(code) for code in range(33, 127)]


def tokenizers(folder: Path) -> tuple[Any, Any]:
    """Tokenizers of single characters."""
    from transformers import CLIPTokenizer, T5Tokenizer

    words = [*CHARACTERS, *(f"{each}</w>" for each in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    clip = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((each, -3.0) for each in CHARACTERS)]
    return clip, T5Tokenizer(vocab=pieces, extra_ids=0)


def text_config(clip: Any) -> Any:
    """The configuration of a CLIP text encoder for the tokenizer."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=32,
        max_position_embeddings=77,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=1,
    )


def sizes(words: Any) -> dict[str, int]:
    """The sizes of a T5 encoder for the tokenizer."""
    return {"vocab_size": len(words) + 8, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}


def picture_vae() -> Any:
    """A VAE that makes pictures eight times as large as their latents."""
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )


def drawn(model: Any, seed: int = 0) -> Any:
    """The model with weights of a seed."""
    from cachepolicy.testing.models import redraw

    redraw(model, seed)
    return model


def sd3(clip: Any, t5: Any) -> Any:
    """Stable Diffusion 3 with four blocks."""
    import diffusers
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=64,  # the engine warms up with a picture of 512 x 512
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=drawn(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=picture_vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(clip)),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(text_config(clip)),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(T5Config(**sizes(t5))),
        tokenizer_3=t5,
    )


def flux(clip: Any, t5: Any) -> Any:
    """FLUX with two double and three single blocks."""
    import diffusers
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return diffusers.FluxPipeline(
        transformer=drawn(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=picture_vae(),
        text_encoder=CLIPTextModel(text_config(clip)),
        tokenizer=clip,
        text_encoder_2=T5EncoderModel(T5Config(**sizes(t5))),
        tokenizer_2=t5,
    )


def wan(clip: Any, t5: Any) -> Any:
    """Wan 2.2 with two experts of three blocks."""
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    experts = [
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=3,
        )
        for _ in range(2)
    ]
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        transformer=drawn(experts[0], 0),
        transformer_2=drawn(experts[1], 1),
        boundary_ratio=0.875,
        scheduler=scheduler,
        vae=diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes(t5))),
        tokenizer=t5,
    )


if __name__ == "__main__":
    import torch

    torch.manual_seed(0)
    target = Path(sys.argv[2])
    {"sd3": sd3, "flux": flux, "wan": wan}[sys.argv[1]](*tokenizers(target / "words")).save_pretrained(target)
