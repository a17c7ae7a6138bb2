# diffusers has no complete type annotations.
# pyright: basic, reportPrivateImportUsage=false
"""The pipeline of the shipped emoji-flux model: diffusers' own `FluxPipeline` around a small trained model.

The components other than the transformer have no trained weights: the text encoders are tables of fixed word vectors,
and the autoencoder reshapes pixels. diffusers finds the classes of a saved pipeline only after this module is imported.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput

# diffusers looks for these base classes in the module of a saved component.
from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedTokenizer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cachepolicy._resources import shipped
from cachepolicy.tools.emoji import NAMES

WORDS = tuple(sorted({word for name in NAMES for word in name.split("_")}))
"""The words that the model was trained on."""

SIZE = 32
"""Height and width of the pictures, in pixels."""

PADDING = "<pad>"
"""The name of token 0, which fills up short prompts."""

_TOKENS = 4
_VOCABULARY = "words.json"


class WordTokenizer(PreTrainedTokenizer):
    """Numbers the words of a prompt and leaves out those that the vocabulary lacks.

    Args:
        vocab_file: A JSON file with a list of words; `WORDS` if None.
        model_max_length: The most words of a prompt.
        pad_token: The name of token 0.
    """

    vocab_files_names = {"vocab_file": _VOCABULARY}  # noqa: RUF012 (the name and type are those of transformers)
    model_input_names = ["input_ids"]  # noqa: RUF012

    def __init__(
        self, vocab_file: str | None = None, *, model_max_length: int = _TOKENS, pad_token: str = PADDING, **kwargs: Any
    ) -> None:
        words = WORDS if vocab_file is None else json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        self._words = [str(pad_token), *words]
        self._numbers = {word: number for number, word in enumerate(self._words)}
        super().__init__(model_max_length=model_max_length, pad_token=pad_token, **kwargs)

    @property
    def vocab_size(self) -> int:
        """The number of words and of the padding token."""
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        """Return the numbers of the words."""
        return dict(self._numbers)

    def __call__(self, *args: Any, max_length: int | None = None, **kwargs: Any) -> Any:
        """Number the words of prompts.

        A `FluxPipeline` fills prompts up to 512 tokens. The model knows `model_max_length` tokens alone.
        """
        limit = self.model_max_length
        return super().__call__(*args, max_length=limit if max_length is None else min(max_length, limit), **kwargs)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the words, and return the path of their file."""
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{_VOCABULARY}"
        path.write_text(json.dumps(self._words[1:]) + "\n", encoding="utf-8")
        return (str(path),)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [word for word in text.lower().replace("_", " ").split() if word in self._numbers]

    def _convert_token_to_id(self, token: str) -> int:
        return self._numbers[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]


class WordEncoder(ModelMixin, ConfigMixin):
    """Gives each word a fixed vector, and stands for both text encoders of a `FluxPipeline`.

    Args:
        words: The words, in the order of their tokens from 1 on. Token 0 has the vector 0.
        dim: The length of a vector.
    """

    @register_to_config
    def __init__(self, words: Sequence[str] = WORDS, dim: int = 32) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding.from_pretrained(
            torch.stack([torch.zeros(dim), *(_word_vector(word, dim) for word in words)])
        )

    def forward(self, input_ids: torch.Tensor, *, output_hidden_states: bool = False) -> BaseModelOutputWithPooling:
        """Look the words up.

        Args:
            input_ids: The tokens, `(B, S)`.
            output_hidden_states: Without effect.

        Returns:
            The vectors, `(B, S, dim)`, and the mean vector of each prompt's words, `(B, dim)`.
        """
        del output_hidden_states
        vectors = self.embedding(input_ids)
        count = (input_ids != 0).sum(1, keepdim=True).clamp(min=1)
        return BaseModelOutputWithPooling(last_hidden_state=vectors, pooler_output=vectors.sum(1) / count)


def _word_vector(word: str, dim: int) -> torch.Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Reshapes pictures `(B, 3, H, W)` to latents `(B, 12, H / 2, W / 2)` and back, without loss.

    Args:
        block_out_channels: One entry more than the number of halvings of height and width.
        latent_channels: The number of channels of a latent.
        scaling_factor: The factor of latents, as of any autoencoder of diffusers.
        shift_factor: The offset of latents.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (3, 12),
        latent_channels: int = 12,  # noqa: ARG002 (pipelines read this and the next ones from the config)
        scaling_factor: float = 1.0,  # noqa: ARG002
        shift_factor: float = 0.0,  # noqa: ARG002
    ) -> None:
        super().__init__()
        # diffusers reads the dtype and the device of a model from its parameters.
        self.unused = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        self.factor = 2 ** (len(block_out_channels) - 1)

    def encode(self, x: torch.Tensor, *, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[torch.Tensor]:
        """Reshape pictures to latents."""
        latents = torch.nn.functional.pixel_unshuffle(x, self.factor)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, z: torch.Tensor, *, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Reshape latents to pictures."""
        pictures = torch.nn.functional.pixel_shuffle(z, self.factor)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)


def shipped_folder() -> Path:
    """Return the folder of the shipped pipeline, as `save_pretrained` writes it."""
    # diffusers reads paths only, and the Traversable of an unpacked package is one.
    return Path(str(shipped("data"))) / "emoji-flux"


def load_pipeline(folder: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """Load the pipeline on the CPU.

    Args:
        folder: A folder with a saved pipeline, whose transformer and scheduler are loaded; the shipped one if None.
        dtype: The dtype of the weights.

    Returns:
        The pipeline, in eval mode and without gradients. Its pictures have 32 by 32 pixels unless a call says
        otherwise.

    Raises:
        OSError: The folder holds no such pipeline.
    """
    path = str(shipped_folder() if folder is None else folder)
    transformer = FluxTransformer2DModel.from_pretrained(
        path, subfolder="transformer", torch_dtype=dtype, local_files_only=True
    )
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler", local_files_only=True)
    # Of other classes than the annotations of `FluxPipeline` name.
    components: Any = {
        "vae": PixelAutoencoder(),
        "text_encoder": WordEncoder(),
        "tokenizer": WordTokenizer(),
        "text_encoder_2": WordEncoder(),
        "tokenizer_2": WordTokenizer(),
    }
    pipe = FluxPipeline(
        scheduler=cast("FlowMatchEulerDiscreteScheduler", scheduler),
        transformer=transformer.eval().requires_grad_(False),
        **components,
    )
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe if dtype == torch.float32 else pipe.to(dtype)


def call_arguments(prompts: Sequence[str], guidance: float = 2.0) -> dict[str, Any]:
    """Return the arguments with which the model is to be sampled.

    Args:
        prompts: Names of `NAMES`, or other texts with their words.
        guidance: The scale of true classifier-free guidance against the empty prompt, in two calls of the model for
            each step. At most 1 calls it once.

    Returns:
        Keyword arguments of the pipeline, without a generator and the number of steps.
    """
    return {
        "prompt": list(prompts),
        "negative_prompt": [""] * len(prompts),
        "true_cfg_scale": guidance,
        "height": SIZE,
        "width": SIZE,
    }
