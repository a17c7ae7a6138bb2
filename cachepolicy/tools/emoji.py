# diffusers comes without complete types: what it returns is not known in the strict sense.
# pyright: basic, reportPrivateImportUsage=false
"""The pipeline of the shipped emoji model: a small real `DiffusionPipeline`, for the demo, examples and tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from cachepolicy._resources import shipped

NAMES = (
    "grin", "heart_eyes", "sunglasses", "crying", "angry", "devil", "alien", "skull", "ghost", "robot", "fox",
    "panda", "lion", "pig", "frog", "chick", "penguin", "octopus", "fish", "ladybug", "apple", "lemon", "banana",
    "watermelon", "grapes", "strawberry", "pineapple", "mushroom", "burger", "donut", "soccer", "red_heart",
    "star", "rainbow", "earth", "tree",
)  # fmt: skip
UNCONDITIONAL = len(NAMES)

Images = torch.Tensor | list[Any]
StepEnd = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


class EmojiPipeline(DiffusionPipeline):
    """Draws emoji by class, with classifier-free guidance, by rectified flow on pixels."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._num_timesteps = 0
        self._guidance_scale = 1.0
        self._current_timestep: torch.Tensor | None = None

    @property
    def num_timesteps(self) -> int:
        """Steps of the present or last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance of the present or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True where the present or last call runs an unconditional half too."""
        return self._guidance_scale > 1

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep that is being denoised, None outside a call."""
        return self._current_timestep

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seed: int | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        sequential_guidance: bool = False,
        callback_on_step_end: StepEnd | None = None,
    ) -> ImagePipelineOutput | tuple[Images]:
        """Draw one picture a label, a class number or a name of `NAMES`.

        `guidance_scale` of at most 1 runs the conditional half alone. `sequential_guidance` calls the model twice a
        step instead of once on a batch `[uncond; cond]`. `seed` starts each picture from noise of its own, the same
        whatever the number of pictures. `output_type` is `"pil"`, or `"pt"` for a tensor of n, 3, 32, 32 numbers in
        [-1, 1].
        """
        classes = [NAMES.index(each) if isinstance(each, str) else each for each in class_labels]
        labels = torch.tensor(classes, device=self._execution_device)
        if latents is None:
            latents = self._noise(len(classes), generator if seed is None else _generators(seed, len(classes)))
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        self._num_timesteps = len(self.scheduler.timesteps)
        self._guidance_scale = guidance_scale
        x: torch.Tensor = latents
        bar: Any = self.progress_bar
        for step, t in enumerate(bar(self.scheduler.timesteps)):
            self._current_timestep = t
            velocity = self._velocity(x, t, labels, sequential=sequential_guidance)
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, step, t, {"latents": x}) or {}).get("latents", x)
        self._current_timestep = None
        self.maybe_free_model_hooks()
        images: Any = x.clamp(-1, 1) if output_type == "pt" else to_pil(x.clamp(-1, 1))
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, count: int, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        config = self.transformer.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        return randn_tensor(shape, generator, self._execution_device, self.transformer.dtype)

    def _velocity(
        self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, *, sequential: bool
    ) -> torch.Tensor:
        if not self.do_classifier_free_guidance:
            return self._call(latents, t, labels)
        null = torch.full_like(labels, UNCONDITIONAL)
        if sequential:
            uncond, cond = self._call(latents, t, null), self._call(latents, t, labels)
        else:
            uncond, cond = self._call(torch.cat([latents, latents]), t, torch.cat([null, labels])).chunk(2)
        return uncond + self._guidance_scale * (cond - uncond)

    def _call(self, latents: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.transformer(
            hidden_states=latents, timestep=t.expand(len(latents)), class_labels=labels, return_dict=False
        )[0]


def _generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 100_003 + number) for number in range(count)]


def load_pipeline(folder: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32) -> EmojiPipeline:
    """The pipeline with the shipped weights, or those of another folder, on the CPU.

    Raises:
        OSError: the folder holds no such model.
    """
    # A Traversable of an unpacked package is a path; diffusers reads nothing else.
    path = Path(str(shipped("data"))) / "emoji-dit" if folder is None else Path(folder)
    transformer = DiTTransformer2DModel.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
    transformer.eval().requires_grad_(False)
    return EmojiPipeline(transformer, FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0))


def to_pil(pictures: torch.Tensor) -> list[Any]:
    """Pillow images of a tensor of n, 3, height, width numbers in [-1, 1]."""
    from PIL import Image

    levels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return [Image.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]
