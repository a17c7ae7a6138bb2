cachepolicy 1
policy dbcache "DBCache"
source "github.com/vipshop/cache-dit"

# The first blocks always run. While what they add to the hidden states stays close to what they added when the middle
# blocks last ran, the residual of the middle blocks is reused or forecast. The last blocks run on the result.
#
# `steps_mask` has a 1 for each step that must compute, as cache-dit's steps computation mask.

param first: int = 8 in [1, inf) "blocks that always run before the span"
param end: int = 1000 "block after the span; -4 leaves four blocks at the end that always run"
param threshold: float = 0.08 in [0, inf)
  "smallest relative change of the first blocks' residual that computes"
param warmup: int = 8 in [0, inf) "steps that compute at the beginning"
param streak: int? = off in [1, inf) "most reuses in a row"
param most: int? = off in [1, inf) "most reuses of a trajectory"
param order: int = 0 in [0, 4] "order of the forecast of the residual; 0 reuses it"
param steps_mask: string? = off "a 1 for each step that must compute"

preset flux for class "^FluxTransformer2DModel$" with first = 8, warmup = 4, threshold = 0.08
  source
    "cache-dit.readthedocs.io/en/latest/benchmark/HYBRID_CACHE (its authors, 50 steps: 1.8 times fewer FLOPs, PSNR 33.8, ImageReward 1.037 of 1.041)"
preset flux_medium for class "^FluxTransformer2DModel$" when false with first = 8, warmup = 4,
  streak = 3, threshold = 0.12
  source
    "cache-dit.readthedocs.io/en/latest/benchmark/HYBRID_CACHE (its authors, 50 steps: 2.05 times fewer FLOPs, PSNR 32.5, ImageReward 1.009 of 1.041)"
preset flux_fast for class "^FluxTransformer2DModel$" when false with first = 4, warmup = 4,
  streak = 4, threshold = 0.12
  source
    "cache-dit.readthedocs.io/en/latest/benchmark/HYBRID_CACHE (its authors, 50 steps: 2.66 times fewer FLOPs, PSNR 31.5, ImageReward 1.007 of 1.041)"
preset qwen_image for class "^QwenImageTransformer2DModel$" when false with first = 1, warmup = 4,
  streak = 3, threshold = 0.24
  source "docs.vllm.ai/projects/vllm-omni (its authors: 1.85 times as fast)"

signal head = residual(blocks[0:first])
signal drift = relative_l1(head, kept(head))

match blocks[first:end]
  when step >= warmup mask steps_mask while drift < threshold at most streak in a row
  at most most in all -> predict taylor(order: order) of residual
match blocks[first:end]
  when step >= warmup while drift < threshold at most streak in a row at most most in all
  -> predict taylor(order: order) of residual

expect blocks[2:] over 12 steps with first = 2, warmup = 4,
  drift = [0, 0, 0, 0, 0.01, 0.09, 0.05, 0.1, 0, 0, 0, 0]: C C C C R C R C R R R R
expect blocks[2:] over 8 steps with first = 2, warmup = 2, steps_mask = "11001000", drift = 0.01:
  C C R R C R R R
