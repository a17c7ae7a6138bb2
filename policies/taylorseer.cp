cachepolicy 1
policy taylorseer "TaylorSeer"
source "arXiv:2503.06923"

# Attention and feed-forward outputs are smooth functions of the step, so they are forecast by a Taylor expansion with
# the recursive differences of the computed steps. The first steps compute, to have differences.
#
# `interval` counts from the last computed step, as the authors do: 0 1 2 7 12 17 ... for an interval of 5. diffusers
# counts from the end of the warm-up, with a forecast first: 0 1 2 4 9 14 19 ...; `diffusers = true` is that schedule,
# and "^.*attn" in `names` limits it to attention, as diffusers' default does.

param interval: int = 6 in [1, inf) "steps from one computed step to the next"
param first: int = 3 in [0, inf) "steps that compute at the beginning"
param last: float = inf "step from which all compute"
param order: int = 1 in [0, 8] "order of the expansion"
param diffusers: bool = false "diffusers' schedule in place of the authors'"
param names: list = [""] "regexes of the modules that are forecast"

preset flux for class "^FluxTransformer2DModel$" with interval = 6, first = 3, order = 1
  source
    "github.com/Shenyi-Z/TaylorSeer/tree/main/TaylorSeer-FLUX (its authors: 3.53 times as fast)"
preset flux_kontext for class "^FluxTransformer2DModel$" when false with interval = 4, first = 3,
  order = 2 source "github.com/Shenyi-Z/TaylorSeer/tree/main/TaylorSeer-FLUX-Kontext"
preset dit for class "^DiTTransformer2DModel$" with interval = 4, first = 2, order = 4
  source
    "github.com/Shenyi-Z/TaylorSeer/blob/main/TaylorSeer-DiT.md (its authors, 50 steps: 3.57 times fewer FLOPs, FID 0.17 above)"
preset dit_slow for class "^DiTTransformer2DModel$" when false with interval = 3, first = 2,
  order = 3
  source
    "github.com/Shenyi-Z/TaylorSeer/blob/main/TaylorSeer-DiT.md (its authors, 50 steps: FID 2.34 for 2.32)"
preset hidream for class "^HiDreamImageTransformer2DModel$" with interval = 4, first = 1, order = 2
  source "github.com/Shenyi-Z/TaylorSeer/tree/main/TaylorSeer-HiDream"
preset hunyuan_video for class "^HunyuanVideoTransformer3DModel$" with interval = 5, first = 1,
  order = 1
  source
    "github.com/Shenyi-Z/TaylorSeer/tree/main/TaylorSeer-HunyuanVideo (its authors: 4.65 times as fast)"
preset framepack for class "^HunyuanVideoFramepackTransformer3DModel$" with interval = 4, first = 1,
  order = 1 source "github.com/Shenyi-Z/TaylorSeer/blob/main/TaylorSeer-FramePack.md"
preset wan for class "^WanTransformer3DModel$" with interval = 5, first = 1, order = 1
  source "github.com/Shenyi-Z/TaylorSeer/tree/main/TaylorSeer-Wan2.1"

let early = step < first
let late = step >= last

match (attention or feedforward) and names when early -> compute
match (attention or feedforward) and names when late -> compute
match (attention or feedforward) and names
  when diffusers every interval offset first + 1 -> predict taylor(order: order)
match (attention or feedforward) and names
  every interval since compute -> predict taylor(order: order)

expect attention over 28 steps with interval = 5:
  C C C R R R R C R R R R C R R R R C R R R R C R R R R C
expect attention over 28 steps with interval = 5, diffusers = true:
  C C C R C R R R R C R R R R C R R R R C R R R R C R R R
expect feedforward over 10 steps with last = 6: C C C R R R C C C C
