cachepolicy 1
policy fastercache "FasterCache"
source "arXiv:2410.19355"

# Two things change little late in a sampling: what attention gives from step to step, and how the unconditional
# half of a guidance batch differs from the conditional one. So most late steps run the conditional half alone, take
# every other attention from the last two by extrapolation, and rebuild the unconditional prediction from the kept
# difference of both halves, in a low and a high frequency band.
#
# `feedback = false` is the paper and its authors' code: attention is extrapolated from computed results only.
# `feedback = true` is diffusers' variant, which extrapolates from its own answers too.

param spatial_every: int? = 2 in [1, inf) "spatial attention: compute every so many steps"
param temporal_every: int? = off in [1, inf) "temporal attention: compute every so many steps"
param uncond_every: int? = 5 in [1, inf) "unconditional half: compute every so many steps"

param spatial_range: range = (-1, 681) "timesteps between which spatial attention is extrapolated"
param temporal_range: range = (-1, 681) "timesteps between which temporal attention is extrapolated"
param uncond_range: range = (-1, 641) "timesteps between which the unconditional half is rebuilt"

param low: float = 1.1 in [0, inf)
  "growth of the kept low-frequency difference at each rebuilt step"
param high: float = 1.1 in [0, inf)
  "growth of the kept high-frequency difference at each rebuilt step"
param low_range: range = (99, 901) "timesteps between which the low band grows"
param high_range: range = (-1, 301) "timesteps between which the high band grows"

param weight: float = 0.5
  "how far attention is extrapolated: newest + (newest - the one before) * weight"
param feedback: bool = false
  "whether answers enter the history of attention (diffusers) or computed results only"

param spatial_names: list = ["^blocks.*attn", "^transformer_blocks.*attn",
    "^single_transformer_blocks.*attn"]
  "regexes of the modules with spatial attention"
param temporal_names: list = ["^temporal_transformer_blocks.*attn"]
  "regexes of the modules with temporal attention"

param layout: string = "found" in {"found", "uncond first", "cond first"}
  "which half of a guidance batch comes first"
param format: string = "found" in {"found", "BCFHW", "BFCHW", "BFHWC", "BCHW", "BSC"}
  "how the prediction is laid out"
param grid: list = []
  "frames, height and width of a token sequence (BSC), where the call does not tell"
param inputs: list = [] "names of the batched inputs; without any they are found by their size"
param distilled: bool = false
  "for a model with guidance built in: there is no unconditional half, attention alone is extrapolated"

match model
  when not distilled and t in uncond_range every uncond_every
  -> approximate uncond spectral(low: low if t in low_range else 1,
    high: high if t in high_range else 1, layout: layout, format: format, grid: grid,
    inputs: inputs)

match optional self_attention and spatial_names
  when t in spatial_range and (uncond_skipped or distilled) every spatial_every
  -> predict linear(weight: weight, feedback: feedback)

match optional self_attention and temporal_names and not spatial_names
  when t in temporal_range and (uncond_skipped or distilled) every temporal_every
  -> predict linear(weight: weight, feedback: feedback)

# Timesteps 999, 888, ..., 0: from the fifth on the unconditional half is rebuilt, but for every fifth step.
expect model over 10 steps: C C C C R C R R R R
expect self_attention and "^transformer_blocks" over 10 steps: C C C C C C C R C R
expect self_attention and "^temporal" over 10 steps with temporal_every = 3: C C C C R C C R R C
expect model over 10 steps with distilled = true: C C C C C C C C C C
expect self_attention and "^transformer_blocks" over 10 steps with distilled = true:
  C C C R C R C R C R
