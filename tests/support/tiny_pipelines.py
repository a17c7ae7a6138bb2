"""Real pipelines of diffusers around tiny models of the zoo: called with embeddings, they stop at the latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.support import zoo

STEPS = 6


NO_TEXT_ENCODER: dict[str, Any] = {"tokenizer": None, "text_encoder": None}
NO_ENCODERS: dict[str, Any] = {**NO_TEXT_ENCODER, "vae": None}
UNCHECKED: dict[str, Any] = {
    **NO_TEXT_ENCODER,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
"""What the pipelines of Stable Diffusion leave out here, and no safety checker either."""


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(width: int = 16, *, rows: int = 1, length: int = 5, masked: bool = False) -> dict[str, Tensor]:
    """Embeddings `(rows, length, width)` of a prompt and a negative prompt; with `masked`, masks that hide nothing."""
    embeddings = {
        "prompt_embeds": normal(rows, length, width),
        "negative_prompt_embeds": normal(rows, length, width, seed=2),
    }
    masks = {
        "prompt_attention_mask": torch.ones(rows, length),
        "negative_prompt_attention_mask": torch.ones(rows, length),
    }
    return embeddings | masks if masked else embeddings


@dataclass
class Tiny:
    """A pipeline, how to call it, and how many calls of the model a step has: the names of its branches."""

    pipe: Any
    arguments: dict[str, Any]
    branches: tuple[str, ...] = ("",)
    denoisers: tuple[str, ...] = ("transformer",)
    notes: dict[str, Any] = field(default_factory=dict)

    def __call__(self, **changes: Any) -> Tensor:
        """The latents of one call, from a fixed seed."""
        arguments = {"num_inference_steps": STEPS, "output_type": "latent", **self.arguments, **changes}
        self.pipe.set_progress_bar_config(disable=True)
        result = self.pipe(generator=torch.Generator().manual_seed(7), **arguments)
        first = result[0]
        return first if isinstance(first, Tensor) else torch.as_tensor(first)

    @property
    def timesteps(self) -> list[float]:
        """The timesteps of the last call."""
        return [float(t) for t in self.pipe.scheduler.timesteps]


def vae_of(kind: str = "AutoencoderKL") -> Any:
    torch.manual_seed(0)
    return getattr(diffusers, kind)(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    ).eval()


def flux_pipeline(transformer: Any, vae: Any = None) -> diffusers.FluxPipeline:
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **NO_TEXT_ENCODER,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=vae,
        transformer=transformer,
    )


def flux() -> Tiny:
    pipe = flux_pipeline(zoo.build("flux"))
    told = {"prompt_embeds": normal(1, 5, 16), "pooled_prompt_embeds": normal(1, 16), "height": 64, "width": 64}
    return Tiny(pipe, told, branches=("cond",))


def flux_true_cfg() -> Tiny:
    tiny = flux()
    tiny.arguments |= {
        "negative_prompt_embeds": normal(1, 5, 16, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 16, seed=2),
        "true_cfg_scale": 4.0,
    }
    tiny.branches = ("cond", "uncond")
    return tiny


def qwenimage() -> Tiny:
    pipe = diffusers.QwenImagePipeline(
        transformer=zoo.build("qwenimage"), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **NO_ENCODERS
    )
    width, mask = pipe.transformer.config.joint_attention_dim, torch.ones(1, 5, dtype=torch.int64)
    arguments = {
        "prompt_embeds": normal(1, 5, width),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": normal(1, 5, width, seed=2),
        "negative_prompt_embeds_mask": mask,
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, arguments, branches=("cond", "uncond"))


def sd3() -> Tiny:
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=zoo.build("sd3"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **NO_ENCODERS,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    config = pipe.transformer.config
    told = {
        **texts(config.joint_attention_dim),
        "pooled_prompt_embeds": normal(1, config.pooled_projection_dim),
        "negative_pooled_prompt_embeds": normal(1, config.pooled_projection_dim, seed=2),
        "height": 64,
        "width": 64,
    }
    return Tiny(pipe, told)


def cogvideox() -> Tiny:
    pipe = diffusers.CogVideoXPipeline(
        transformer=zoo.build("cogvideox"), scheduler=diffusers.CogVideoXDDIMScheduler(), **NO_ENCODERS
    )
    config = pipe.transformer.config
    told = {
        **texts(config.text_embed_dim, length=config.max_text_seq_length),
        "height": config.sample_height * 8,
        "width": config.sample_width * 8,
        "num_frames": 5,
    }
    return Tiny(pipe, told, branches=("cond_uncond",))


def unipc() -> diffusers.UniPCMultistepScheduler:
    """The scheduler of Wan."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan(**parts: Any) -> Tiny:
    pipe = diffusers.WanPipeline(transformer=zoo.build("wan"), scheduler=unipc(), **NO_ENCODERS, **parts)
    told = {**texts(), "height": 64, "width": 64, "num_frames": 5}
    return Tiny(pipe, told, branches=("cond", "uncond"))


def wan22() -> Tiny:
    tiny = wan(transformer_2=zoo.build("wan", seed=5), boundary_ratio=0.7)
    tiny.denoisers = ("transformer", "transformer_2")
    return tiny


def ltx() -> Tiny:
    pipe = diffusers.LTXPipeline(
        transformer=zoo.build("ltx"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **NO_ENCODERS,
    )
    told = {
        **texts(masked=True),
        "height": 64,
        "width": 64,
        "num_frames": 9,
    }
    return Tiny(pipe, told, branches=("cond_uncond",))


def pixart() -> Tiny:
    pipe = diffusers.PixArtAlphaPipeline(
        transformer=zoo.build("pixart"), scheduler=diffusers.DPMSolverMultistepScheduler(), **NO_ENCODERS
    )
    told = {
        "prompt": None,
        "negative_prompt": None,
        **texts(masked=True),
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
    }
    return Tiny(pipe, told)


def dit() -> Tiny:
    # The pipeline's empty label is 1000.
    model = zoo.build("dit", num_embeds_ada_norm=1000)
    pipe = diffusers.DiTPipeline(transformer=model, vae=vae_of(), scheduler=diffusers.DDIMScheduler())
    return Tiny(pipe, {"class_labels": [3], "output_type": "np"})


def latte() -> Tiny:
    pipe = diffusers.LattePipeline(
        vae=vae_of(), transformer=zoo.build("latte"), scheduler=diffusers.DDIMScheduler(), **NO_TEXT_ENCODER
    )
    told = {
        "prompt": None,
        "negative_prompt": None,
        **texts(),
        "height": 16,
        "width": 16,
        "video_length": 2,
        "clean_caption": False,
    }
    return Tiny(pipe, told)


def unet_sd(scheduler: Any = None) -> Tiny:
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae_of(),
        unet=zoo.build("unet2d_condition"),
        scheduler=scheduler or diffusers.PNDMScheduler(skip_prk_steps=True),
        **UNCHECKED,
    )
    told = {
        **texts(8),
        "height": 16,
        "width": 16,
    }
    return Tiny(pipe, told, denoisers=("unet",))


def unet_sd_edm() -> Tiny:
    return unet_sd(diffusers.EDMEulerScheduler())


def unet_sd_heun() -> Tiny:
    return unet_sd(diffusers.HeunDiscreteScheduler())


class Unchecked(torch.nn.Module):
    """A safety checker that finds everything safe."""

    dtype, device = torch.float32, torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _cosmos(kind: Any, channels: int, vae: Any, **told: Any) -> Tiny:
    parts: dict[str, Any] = {**NO_TEXT_ENCODER, "vae": vae, "safety_checker": Unchecked()}
    pipe = kind(
        transformer=zoo.build("cosmos", in_channels=channels),
        scheduler=diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5),
        **parts,
    )
    width = zoo.entry("cosmos").config["text_embed_dim"]
    arguments = {
        "prompt": None,
        **texts(width),
        "height": 32,
        "width": 32,
        "num_frames": 9,
    }
    return Tiny(pipe, arguments | told, branches=("", "1"))


def cosmos_text_to_world() -> Tiny:
    return _cosmos(diffusers.CosmosTextToWorldPipeline, zoo.entry("cosmos").config["out_channels"], None)


def cosmos_video_to_world() -> Tiny:
    channels = zoo.entry("cosmos").config["out_channels"]
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=channels,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        latents_mean=None,
        latents_std=None,
    ).eval()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return _cosmos(diffusers.CosmosVideoToWorldPipeline, channels + 1, vae, image=image)


PIPELINES: dict[str, Callable[[], Tiny]] = {
    each.__name__: each
    for each in (
        flux,
        flux_true_cfg,
        qwenimage,
        sd3,
        cogvideox,
        wan,
        wan22,
        ltx,
        pixart,
        dit,
        latte,
        unet_sd,
        unet_sd_edm,
        unet_sd_heun,
    )
}
