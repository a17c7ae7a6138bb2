"""Guidance in diffusers' pipelines: names of branches, and how a batch of several parts is made."""

from __future__ import annotations

import re
from collections.abc import Mapping

COND_BRANCHES = frozenset({"cond", "pred_cond"})
UNCOND_BRANCHES = frozenset({"uncond", "pred_uncond"})
"""The names by which pipelines enter `cache_context` around the two calls of a step.

`pred_cond` and `pred_uncond` are those of the guiders in `diffusers.guiders`.
"""

BATCH_CONTEXT = "cond_uncond"
"""The name of the `cache_context` around one call with a batch of both halves."""

GUIDANCE_PROPERTY = "do_classifier_free_guidance"
"""The property of a pipeline that says whether guidance is on. It does not say how many parts a batch has."""

FURTHER_BRANCHES = frozenset(
    {"uncond_stg", "uncond_modality", "pred_cond_skip", "pred_cond_seg", "pred_cond_stg", "pred_cond_modality"}
)
"""Names of the further calls of a step, of perturbed and of skip-layer guidance."""

CALL_CONTEXT = re.compile(r"""cache_context\(["'](\w+)["']""")
"""How the source of a pipeline enters the `cache_context` of a call."""

DISTILLED = ("guidance_embeds", "guidance_scale_embeds", "time_cond_proj_dim", "is_turbo")
"""Entries of a model's config that are set where guidance is built in, so that there is no unconditional half.

The guidance scale is an input of the model (FLUX.1-dev, SANA-Sprint; `time_cond_proj_dim` in latent consistency
models), or the weights contain it (the turbo variants of ACE-Step).
"""

DISTILLED_PIPELINE = "is_distilled"
"""The entry of a pipeline's `model_index.json` that says the same of its model (FLUX.2 [klein])."""


def distilled_by(config: object) -> str | None:
    """Returns the entry of a model's config that shows that guidance is built in, or None."""
    if not isinstance(config, Mapping):
        return None
    entries: dict[object, object] = {**config}
    return next((name for name in DISTILLED if entries.get(name) not in {None, False}), None)


PERTURBED_PROPERTY = "do_perturbed_attention_guidance"
"""The property of the pipelines with perturbed attention guidance (`diffusers.pipelines.pag`) that says that it is on.

Their batches have three parts (unconditional, conditional, perturbed).
"""

ORDER_ATTRIBUTE = "guidance_order"
"""The attribute by which a pipeline outside diffusers may say the order of its batches: `("uncond", "cond")`."""

PIPELINES = "diffusers.pipelines."
"""The package of pipelines, whose classes have unique names."""

Order = tuple[str, ...]
"""The parts of a guidance batch in order, each with one row per sample."""

UNCOND_FIRST: Order = ("uncond", "cond")

ORDERS: Mapping[str, tuple[Order, ...]] = {
    "AceStepPipeline": (("cond", "uncond"),),
    "CycleDiffusionPipeline": (("source uncond", "uncond", "source cond", "cond"),),
    "DiTPipeline": (("cond", "uncond"),),
    "DreamLitePipeline": (("uncond", "cond"), ("uncond", "image", "cond")),
    "LEditsPPPipelineStableDiffusion": (("uncond", "edit"), ("uncond", "edit", "...")),
    "LEditsPPPipelineStableDiffusionXL": (("uncond", "edit"), ("uncond", "edit", "...")),
    "LuminaPipeline": (("cond", "uncond"),),
    "OmniGenPipeline": (("cond", "uncond"), ("cond", "uncond", "image")),
    "SemanticStableDiffusionPipeline": (("uncond", "cond"), ("uncond", "cond", "edit", "...")),
    "StableCascadeDecoderPipeline": (("cond", "uncond"),),
    "StableCascadePriorPipeline": (("cond", "uncond"),),
    "StableDiffusionDiffEditPipeline": (("uncond", "cond"), ("source uncond", "source cond", "uncond", "cond")),
    "StableDiffusionInstructPix2PixPipeline": (("cond", "image", "uncond"),),
    # One pair of rows per view, instead of two halves.
    "StableDiffusionPanoramaPipeline": (("uncond", "cond"), ("uncond", "cond", "uncond", "cond", "...")),
    "StableDiffusionPipelineSafe": (("uncond", "cond"), ("uncond", "cond", "safety")),
    "StableDiffusionXLInstructPix2PixPipeline": (("cond", "image", "uncond"),),
    "WuerstchenDecoderPipeline": (("cond", "uncond"),),
    "WuerstchenPriorPipeline": (("cond", "uncond"),),
    "ZImageControlNetInpaintPipeline": (("cond", "uncond"),),
    "ZImageControlNetPipeline": (("cond", "uncond"),),
    "ZImageImg2ImgPipeline": (("cond", "uncond"),),
    "ZImageInpaintPipeline": (("cond", "uncond"),),
    "ZImageOmniPipeline": (("cond", "uncond"),),
    "ZImagePipeline": (("cond", "uncond"),),
}
"""The orders that the guidance batch of a pipeline may have, by class name.

They were read from the place where the `__call__` of each pipeline splits the prediction. All other pipelines with
guidance batches use `UNCOND_FIRST`.
"""

COND_FIRST_MODELS = frozenset(
    {
        "diffusers.models.transformers.ace_step_transformer.AceStepTransformer1DModel",
        "diffusers.models.transformers.dit_transformer_2d.DiTTransformer2DModel",
        "diffusers.models.transformers.lumina_nextdit2d.LuminaNextDiT2DModel",
        "diffusers.models.transformers.transformer_omnigen.OmniGenTransformer2DModel",
        "diffusers.models.transformers.transformer_z_image.ZImageTransformer2DModel",
        "diffusers.models.unets.unet_stable_cascade.StableCascadeUNet",
    }
)
"""The denoisers whose pipelines in diffusers put the conditional half first."""


def orders_of(pipeline: type) -> tuple[Order, ...] | None:
    """Return the orders that the guidance batch of a pipeline may have, or None for unknown pipelines."""
    own = getattr(pipeline, ORDER_ATTRIBUTE, None)
    if own is not None:
        return (tuple(own),)
    for cls in pipeline.__mro__:
        if cls.__module__.startswith(PIPELINES):
            return ORDERS.get(cls.__name__, (UNCOND_FIRST,))
    return None
