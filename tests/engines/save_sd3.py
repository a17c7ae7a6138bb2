"""Saves a tiny Stable Diffusion 3 with random weights, as engines load it: `python save_sd3.py FOLDER`."""

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


def main(folder: Path) -> None:
    """Build the pipeline and save it."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from cachepolicy.testing.models import redraw

    torch.manual_seed(0)
    clip, t5 = tokenizers(folder / "words")
    config = CLIPTextConfig(
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
    redraw(transformer, 0)
    vae = diffusers.AutoencoderKL(
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
    sizes = T5Config(vocab_size=len(t5) + 8, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(sizes),
        tokenizer_3=t5,
    ).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
