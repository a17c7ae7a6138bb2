"""Pipelines around the shipped emoji model that sample it in other ways than its own pipeline does."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from cachepolicy.tools.emoji import UNCONDITIONAL, EmojiPipeline


class EpsilonModel(nn.Module):
    """The emoji model as one that predicts the noise of a diffusion with a schedule of betas.

    A sample a x + s e of such a diffusion, divided by a + s, is the sample of the flow at s / (a + s).
    """

    def __init__(self, transformer: nn.Module, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.transformer = transformer
        self.alphas = alphas_cumprod.double()

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """The noise, at timesteps between 0 and 999."""
        position = timestep.flatten()[0].double().clamp(0, len(self.alphas) - 1)
        below, share = int(position), float(position - int(position))
        above = min(below + 1, len(self.alphas) - 1)
        product = (1 - share) * self.alphas[below] + share * self.alphas[above]
        a, s = float(product.sqrt()), float((1 - product).sqrt())
        t, x = s / (a + s), hidden_states / (a + s)
        times = torch.full((len(x),), 1000 * t)
        velocity = self.transformer(hidden_states=x, timestep=times, class_labels=class_labels, return_dict=False)[0]
        return x + (1 - t) * velocity


def epsilon_sampler(model: EpsilonModel, own: Any) -> Any:
    """A function that samples the model, with the given scheduler or another one."""

    @torch.no_grad()
    def sample(
        class_labels: list[int], generator: torch.Generator, num_inference_steps: int, scheduler: Any = None
    ) -> Tensor:
        scheduler = own if scheduler is None else scheduler
        scheduler.set_timesteps(num_inference_steps)
        labels = torch.tensor(class_labels)
        labels = torch.cat([torch.full_like(labels, UNCONDITIONAL), labels])
        x = torch.randn(len(class_labels), 3, 32, 32, generator=generator) * scheduler.init_noise_sigma
        noisy = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(torch.cat([x, x]), t)
            uncond, cond = model(hidden_states=given, timestep=t.expand(len(given)), class_labels=labels).chunk(2)
            x = scheduler.step(uncond + 2 * (cond - uncond), t, x, return_dict=False, **noisy)[0]
        return x.clamp(-1, 1)

    return sample


class Renormalised(EmojiPipeline):
    """Guidance that keeps the norm of the conditional half."""

    def _velocity(self, latents: Tensor, t: Tensor, labels: Tensor, *, sequential: bool) -> Tensor:
        guided = super()._velocity(latents, t, labels, sequential=sequential)
        cond = self._call(latents, t, labels)
        norms = [each.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for each in (cond, guided)]
        return guided * norms[0] / norms[1]


class TwoExperts(EmojiPipeline):
    """A second denoiser takes over at a timestep, as in Wan 2.2."""

    def __init__(self, transformer: Any, scheduler: Any, transformer_2: Any) -> None:
        super().__init__(transformer, scheduler)
        self.register_modules(transformer_2=transformer_2)

    def _call(self, latents: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        model = self.transformer if float(t) > 600 else self.transformer_2
        return model(hidden_states=latents, timestep=t.expand(len(latents)), class_labels=labels, return_dict=False)[0]


class TwoOutputs(EmojiPipeline):
    """Two pictures of one call of the model, each stepped by a scheduler of its own."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 50,
        *,
        generator: torch.Generator | None = None,
        output_type: str = "np",
    ) -> Any:
        """Draw two pictures of each class."""
        del output_type
        labels = torch.tensor(class_labels * 2)
        x = torch.randn(len(labels), 3, 32, 32, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        self._guidance_scale = 2.0
        pictures = [self.scheduler, copy.deepcopy(self.scheduler)]
        for t in self.scheduler.timesteps:
            halves = self._velocity(x, t, labels, sequential=False).chunk(2)
            stepped = [
                scheduler.step(velocity, t, half, return_dict=False)[0]
                for scheduler, velocity, half in zip(pictures, halves, x.chunk(2), strict=True)
            ]
            x = torch.cat(stepped)
        return FrozenDict(images=((x.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy())
