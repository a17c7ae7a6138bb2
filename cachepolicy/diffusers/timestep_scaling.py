"""Scales of the timestep argument: how each denoiser class of diffusers is called.

The values were read from the pipelines of diffusers 0.42.1, which scale the scheduler's timestep before they call their
denoiser (`timestep / 1000`, `1 - timestep / 1000`, ...).
"""

from __future__ import annotations

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
    f"{_TRANSFORMERS}transformer_longcat_audio_dit.LongCatAudioDiTTransformer": _FRACTION,
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
