"""How the denoisers of diffusers scale the timestep that they are called with: data, not code."""

from __future__ import annotations

from dataclasses import dataclass

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "vision_timesteps", "timestep_ratio")
"""The names under which a root may take its timestep, the likeliest first."""


@dataclass(frozen=True, slots=True)
class Scale:
    """An argument of `value` stands for the training timestep `value * factor`, or 1000 minus that when reversed.

    `lowest` is for a model that is called with one value a token, of which the noisiest is the smallest.
    """

    factor: float = 1.0
    reverse: bool = False
    lowest: bool = False

    def to_training(self, value: float) -> float:
        """The timestep in training units, 0..1000."""
        scaled = value * self.factor
        return 1000.0 - scaled if self.reverse else scaled


RAW_SCALE = Scale()

_FRACTION = (
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel", "ChromaTransformer2DModel",
    "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel", "QwenImageTransformer2DModel",
    "QwenImage21Transformer2DModel", "AuraFlowTransformer2DModel", "NucleusMoEImageTransformer2DModel",
    "PRXTransformer2DModel", "Krea2Transformer2DModel", "LongCatAudioDiTTransformer", "AceStepTransformer1DModel",
    "BriaFibo2Transformer2DModel", "StableAudioDiTModel", "StableAudio3DiTModel", "StableCascadeUNet",
)  # fmt: skip
_REVERSED_FRACTION = (
    "Lumina2Transformer2DModel", "LuminaNextDiT2DModel", "ZImageTransformer2DModel", "Ideogram4Transformer2DModel",
    "MiniMaxMusic3Transformer1DModel", "OmniGenTransformer2DModel",
)  # fmt: skip

SCALES: dict[str, Scale | None] = {
    **dict.fromkeys(_FRACTION, Scale(1000.0)),
    **dict.fromkeys(_REVERSED_FRACTION, Scale(1000.0, reverse=True)),
    "MiniMaxH3Transformer3DModel": Scale(1000.0, reverse=True, lowest=True),
    "MochiTransformer3DModel": Scale(reverse=True),
    # Called with a function of sigma that is in no unit of timesteps: these ask for a scheduler.
    "CosmosTransformer3DModel": None,
    "UNetSpatioTemporalConditionModel": None,
}
"""By name of a class of diffusers; a class that is not here is called with training timesteps as they are."""


def listed_class(kind: type) -> str | None:
    """The name in `SCALES` of the first listed class of diffusers that `kind` is or inherits from."""
    for each in kind.__mro__:
        if each.__name__ in SCALES and each.__module__.partition(".")[0] == "diffusers":
            return each.__name__
    return None
