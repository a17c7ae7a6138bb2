"""Guidance in diffusers' pipelines: names of branches, and how a batch of several parts is made."""

from __future__ import annotations

import re

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

DISTILLED = "guidance_embeds"
"""The entry of a model's config that is true where the guidance scale is an input of the model, as in FLUX.1-dev.

Such a model has no unconditional half.
"""
