# diffusers has no complete type annotations.
# pyright: basic, reportPrivateImportUsage=false
"""The pipeline of the shipped emoji model: a small `DiffusionPipeline` for the demonstration, examples and tests."""

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
from cachepolicy.tools.pictures import to_pil

NAMES = (
    "grin", "heart_eyes", "sunglasses", "crying", "angry", "devil", "alien", "skull", "ghost", "robot", "fox",
    "panda", "lion", "pig", "frog", "chick", "penguin", "octopus", "fish", "ladybug", "apple", "lemon", "banana",
    "watermelon", "grapes", "strawberry", "pineapple", "mushroom", "burger", "donut", "soccer", "red_heart",
    "star", "rainbow", "earth", "tree",
)  # fmt: skip
"""The names of the classes, by class number."""

UNCONDITIONAL = len(NAMES)
"""The class number of the unconditional half."""

Images = torch.Tensor | list[Any]
"""Pictures as a tensor `(N, 3, H, W)` in [-1, 1], or as Pillow images."""

StepEnd = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]
"""The callback of diffusers after each step: `callback(pipe, step, timestep, {"latents": x})`."""


class EmojiPipeline(DiffusionPipeline):
    """Draws emoji by class, with rectified flow on pixels and classifier-free guidance.

    Args:
        transformer: The denoiser.
        scheduler: The scheduler.
    """

    model_cpu_offload_seq = "transformer"
    guidance_order = ("uncond", "cond")

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._num_timesteps = 0
        self._guidance_scale = 1.0
        self._current_timestep: torch.Tensor | None = None

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the present or last call."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the present or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the present or last call also predicts without the class."""
        return self._guidance_scale > 1

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the present step, None outside a call."""
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
        """Draw one picture for each label.

        Args:
            class_labels: Class numbers, or names of `NAMES`.
            num_inference_steps: The number of denoising steps.
            guidance_scale: The scale of classifier-free guidance; at most 1 runs the conditional half only.
            generator: The random generators of the initial noise.
            seed: Instead of `generator`: a seed from which each picture gets its own noise, which does not depend on
                the number of pictures.
            latents: Instead of drawn noise: the initial noise, `(N, 3, 32, 32)`.
            output_type: `"pil"` for Pillow images, `"pt"` for a tensor `(N, 3, 32, 32)` in [-1, 1], `"np"` for an array
                `(N, 32, 32, 3)` in [0, 1].
            return_dict: If False, return a tuple.
            sequential_guidance: If True, call the model twice for each step, instead of once on `[uncond; cond]`.
            callback_on_step_end: Called after each step; it may return other latents.

        Returns:
            The pictures, as `ImagePipelineOutput` or in a tuple.

        Raises:
            ValueError: A name is not in `NAMES`.
        """
        classes = [NAMES.index(label) if isinstance(label, str) else label for label in class_labels]
        labels = torch.tensor(classes, device=self._execution_device)
        if latents is None:
            if seed is not None:
                generator = [torch.Generator().manual_seed(seed * 100_003 + number) for number in range(len(classes))]
            config = self.transformer.config
            shape = (len(classes), config.in_channels, config.sample_size, config.sample_size)
            latents = randn_tensor(shape, generator, self._execution_device, self.transformer.dtype)
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
        images: Any = x.clamp(-1, 1)
        if output_type == "np":
            images = ((images.float() + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
        elif output_type != "pt":
            images = to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

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


def load_pipeline(folder: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32) -> EmojiPipeline:
    """Load the pipeline on the CPU.

    Args:
        folder: A folder with a saved transformer; the shipped weights if None.
        dtype: The dtype of the weights.

    Returns:
        The pipeline, in eval mode and without gradients.

    Raises:
        OSError: The folder holds no such model.
    """
    # diffusers reads paths only, and the Traversable of an unpacked package is one.
    path = Path(str(shipped("data"))) / "emoji-dit" if folder is None else Path(folder)
    transformer = DiTTransformer2DModel.from_pretrained(str(path), torch_dtype=dtype, local_files_only=True)
    transformer.eval().requires_grad_(False)
    return EmojiPipeline(transformer, FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0))
