"""Scales of timesteps: how each denoiser class of diffusers is called, and in what its schedulers count.

The values were read from the pipelines of diffusers 0.42.1 and vLLM-Omni 0.30.0, which scale the scheduler's timestep
before they call their denoiser (`timestep / 1000`, `1 - timestep / 1000`, ...). SGLang calls all its denoisers with the
scheduler's timestep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """Converts a timestep argument to training units, where 1000 is noise and 0 is the picture.

    Attributes:
        factor: The argument is multiplied by this.
        reverse: The result is subtracted from 1000.
        lowest: The noisiest token has the smallest value, for models that are called with one value per token.
    """

    factor: float = 1.0
    reverse: bool = False
    lowest: bool = False

    def to_training(self, value: float) -> float:
        """Return the timestep in training units (0..1000)."""
        scaled = value * self.factor
        return 1000.0 - scaled if self.reverse else scaled


RAW_SCALE = Scale()
"""The argument is the timestep in training units."""

_FRACTION = Scale(1000.0)
_REVERSED_FRACTION = Scale(1000.0, reverse=True)

_TRANSFORMERS = "diffusers.models.transformers."
_UNETS = "diffusers.models.unets."
_OMNI = "vllm_omni.diffusion.models."

SCALES: dict[str, Scale | None] = {
    f"{_TRANSFORMERS}ace_step_transformer.AceStepTransformer1DModel": _FRACTION,
    f"{_TRANSFORMERS}auraflow_transformer_2d.AuraFlowTransformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}lumina_nextdit2d.LuminaNextDiT2DModel": _REVERSED_FRACTION,
    f"{_TRANSFORMERS}stable_audio_transformer.StableAudioDiTModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_bria_fibo2.BriaFibo2Transformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_chroma.ChromaTransformer2DModel": _FRACTION,
    # Called with a function of sigma that cannot be converted to a timestep. These need a scheduler.
    f"{_TRANSFORMERS}transformer_cosmos.CosmosTransformer3DModel": None,
    f"{_TRANSFORMERS}transformer_flux.FluxTransformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_flux2.Flux2Transformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_flux3.Flux3Transformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_ideogram4.Ideogram4Transformer2DModel": _REVERSED_FRACTION,
    f"{_TRANSFORMERS}transformer_krea2.Krea2Transformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_longcat_audio_dit.LongCatAudioDiTTransformer": _REVERSED_FRACTION,
    f"{_TRANSFORMERS}transformer_longcat_image.LongCatImageTransformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_lumina2.Lumina2Transformer2DModel": _REVERSED_FRACTION,
    f"{_TRANSFORMERS}transformer_minimax_h3.MiniMaxH3Transformer3DModel": Scale(1000.0, reverse=True, lowest=True),
    f"{_TRANSFORMERS}transformer_minimax_music3.MiniMaxMusic3Transformer1DModel": _REVERSED_FRACTION,
    f"{_TRANSFORMERS}transformer_mochi.MochiTransformer3DModel": Scale(reverse=True),
    f"{_TRANSFORMERS}transformer_nucleusmoe_image.NucleusMoEImageTransformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_omnigen.OmniGenTransformer2DModel": _REVERSED_FRACTION,
    f"{_TRANSFORMERS}transformer_ovis_image.OvisImageTransformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_prx.PRXTransformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_qwenimage.QwenImageTransformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_qwenimage21.QwenImage21Transformer2DModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_stable_audio3.StableAudio3DiTModel": _FRACTION,
    f"{_TRANSFORMERS}transformer_z_image.ZImageTransformer2DModel": _REVERSED_FRACTION,
    f"{_UNETS}unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel": None,
    f"{_UNETS}unet_stable_cascade.StableCascadeUNet": _FRACTION,
    f"{_OMNI}flux.flux_transformer.FluxTransformer2DModel": _FRACTION,
    f"{_OMNI}flux2.flux2_transformer.Flux2Transformer2DModel": _FRACTION,
    f"{_OMNI}flux2_klein.flux2_klein_transformer.Flux2Transformer2DModel": _FRACTION,
    f"{_OMNI}krea2.krea2_transformer.Krea2Transformer2DModel": _FRACTION,
    f"{_OMNI}longcat_image.longcat_image_transformer.LongCatImageTransformer2DModel": _FRACTION,
    f"{_OMNI}ovis_image.ovis_image_transformer.OvisImageTransformer2DModel": _FRACTION,
    f"{_OMNI}qwen_image.qwen_image_transformer.QwenImageTransformer2DModel": _FRACTION,
    f"{_OMNI}z_image.z_image_transformer.ZImageTransformer2DModel": _REVERSED_FRACTION,
}
"""Scales by module path and class. A class that is not listed is called with timesteps in training units.

None marks classes whose argument cannot be converted. Another package may have a class of the same name that is called
in another scale, so the class name alone is no key.
"""


def listed_class(kind: type) -> str | None:
    """Return the first key of `SCALES` that `kind` is or inherits from, or None."""
    for cls in kind.__mro__:
        key = f"{cls.__module__}.{cls.__qualname__}"
        if key in SCALES:
            return key
    return None


def scale_of(kind: type) -> Scale | None:
    """Return the scale of a model class, or None if its argument cannot be converted."""
    listed = listed_class(kind)
    return RAW_SCALE if listed is None else SCALES[listed]


# --- schedulers ------------------------------------------------------------------------------------------

_ANGLES = frozenset({"SCMScheduler"})
_ENDS_AT_LAST = frozenset({"SCMScheduler", "DDPMWuerstchenScheduler"})
_LEAVES_LAST = frozenset({"LTXI2VLongMultiPromptPipeline"})


def training_units(
    kind: type, timesteps: Sequence[float], sigmas: Sequence[float] | None = None, *, inverted: bool = False
) -> list[float] | None:
    """Return the timesteps of a scheduler in training units, or None if they cannot be converted.

    Args:
        kind: The class of the scheduler.
        timesteps: All timesteps of a trajectory, in the scheduler's own unit.
        sigmas: The sigmas of the scheduler, or None. If they rise as well, the trajectory goes to the noise.
        inverted: Whether the timesteps count the picture instead of the noise, as under `invert_sigmas` of diffusers.
    """
    if not timesteps:
        return []
    lowest, highest = min(timesteps), max(timesteps)
    if _is_one_of(kind, _ANGLES):
        # An angle a stands for the time sin(a) / (sin(a) + cos(a)) with which the model is called.
        return [1000.0 * math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in timesteps]
    if lowest < -_TINY or highest > 1000.0 + _SLACK:
        return None
    fractions = len(timesteps) > 1 and highest <= 1.0 + _TINY
    numbers = [1000.0 * timestep for timestep in timesteps] if fractions else list(timesteps)
    rises = fractions and timesteps[-1] > timesteps[0] and not (sigmas and sigmas[:2][-1] > sigmas[0])
    return [1000.0 - number for number in numbers] if inverted or rises else numbers


def unused_timesteps(
    scheduler: type, pipeline: type | None, timesteps: Sequence[float], sigmas: Sequence[float] | None
) -> int:
    """Return how many of the last timesteps no model is called with.

    Some schedulers list the clean sample, where the last step ends, as a timestep, and loops leave it out.

    Args:
        scheduler: The class of the scheduler.
        pipeline: The class of the pipeline, or None.
        timesteps: All timesteps of a trajectory.
        sigmas: The sigmas of the scheduler, or None.
    """
    if len(timesteps) < 2:
        return 0
    clean = sigmas is not None and len(sigmas) == len(timesteps) and sigmas[-1] == 0
    return int(clean or _is_one_of(scheduler, _ENDS_AT_LAST) or _is_one_of(pipeline, _LEAVES_LAST))


def _is_one_of(kind: type | None, names: frozenset[str]) -> bool:
    return kind is not None and any(cls.__name__ in names for cls in kind.__mro__)


_TINY, _SLACK = 1e-3, 1.0
