"""Where diffusers' pipelines hold their denoisers, and where the classes of denoisers are defined."""

from __future__ import annotations

DENOISERS = ("transformer", "transformer_2", "transformer_3", "unet", "dit", "prior", "decoder")
"""The attributes of a pipeline that may hold a denoiser, the most frequent first. A saved pipeline has such folders.

`transformer_2` is the second expert of Wan 2.2, `prior` and `decoder` are those of Kandinsky and Stable Cascade.
`transformer_3` and `dit` occur in pipelines outside diffusers only.
"""

DENOISER_PACKAGES = ("diffusers.models.transformers.", "diffusers.models.unets.")
"""The packages of denoiser classes, by which components with other names are found."""
