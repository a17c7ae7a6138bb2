"""The names under which diffusers pipelines hold their denoisers."""

from __future__ import annotations

DENOISERS = ("transformer", "transformer_2", "transformer_3", "unet", "dit", "prior", "decoder")
"""The attributes of a pipeline, and the folders of a saved one, that may hold a denoiser, the likeliest first."""
