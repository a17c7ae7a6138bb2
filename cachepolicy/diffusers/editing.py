"""How diffusers' pipelines for editing show that their calls hold reference pictures."""

from __future__ import annotations

import re

REFERENCES = re.compile(
    r"""\bcat\(\[\s*latent\w*,\s*\w*(?:image|condition|reference)\w*latents\w*\s*\],\s*dim=1\)""",
)
"""How the source of a pipeline puts the tokens of reference pictures after those of the picture."""

POSITIONS = re.compile(r"\b(?:img_ids|img_shapes)\s*=")
"""How it tells the model their positions. Pipelines without them have no tokens, and add channels instead."""

EDITING_MODELS = frozenset({"WanVACETransformer3DModel"})
"""Classes of models that are for references alone."""
