cachepolicy 1
policy first_block_cache "First Block Cache"
source "github.com/chengzeyi/ParaAttention"

# The first block always runs. While what it adds to the hidden states stays close to what it added when the rest
# of the blocks last ran, the rest would add about the same as then, too.
#
# Other ports have a warm-up, a limit of reuses in a row, and a window of the trajectory; none is set here.

param threshold: float = 0.05 in [0, inf)
  "largest relative change of the first block's residual that still reuses"
param warmup: int = 0 in [0, inf) "steps that compute at the beginning"
param streak: int? = off in [1, inf) "most reuses in a row"
param window: range = [0, 1] "shares of the trajectory between which steps reuse"

preset flux for class "^FluxTransformer2DModel$" with threshold = 0.05
  source "github.com/huggingface/diffusers/pull/11180 (its authors: 1.3 times as fast)"
preset flux_medium for class "^FluxTransformer2DModel$" when false with threshold = 0.1
  source "github.com/huggingface/diffusers/pull/11180 (its authors: 1.8 times as fast)"
preset flux_fast for class "^FluxTransformer2DModel$" when false with threshold = 0.2
  source "github.com/huggingface/diffusers/pull/11180 (its authors: 2.8 times as fast)"
preset cogview4 for class "^CogView4Transformer2DModel$" with threshold = 0.05
  source "github.com/huggingface/diffusers/pull/11180 (its authors: 1.7 times as fast)"
preset wan for class "^WanTransformer3DModel$" with threshold = 0.05
  source "github.com/huggingface/diffusers/pull/11180 (its authors: 1.6 times as fast)"
preset hunyuan_video for class "^HunyuanVideoTransformer3DModel$" with threshold = 0.05
  source "github.com/huggingface/diffusers/pull/11180 (its authors: 1.95 times as fast)"
preset ltx_video for class "^LTXVideoTransformer3DModel$" with threshold = 0.05
  source "github.com/huggingface/diffusers/pull/11180 (its authors: 1.5 times as fast)"

signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))

match blocks[1:]
  when step >= warmup and progress in window while drift <= threshold at most streak in a row
  -> reuse residual

# Without a history the first step computes, whatever the drift.
expect blocks[1:] over 6 steps with drift = [0, 0.01, 0.05, 0.06, 0.02, 0.2]: C R R C R C
expect blocks[1:] over 4 steps with drift = 0.1, threshold = 0.2: C R R R
expect blocks[1:] over 8 steps with drift = 0, warmup = 2, streak = 2: C C R R C R R C
expect blocks[1:] over 5 steps with drift = 0, window = [0.25, 0.8]: C R R R C
