cachepolicy 1
policy fbc_edit "First Block Cache for editing"
source "github.com/chengzeyi/ParaAttention"

# `fbc` for models that are called with reference pictures: FLUX.1 Kontext, FLUX.2, Qwen-Image-Edit. Their tokens do not
# change, so that a change over all tokens is smaller than that of the picture. Here the tokens of the picture are
# compared alone; without references, these are all tokens, and the policy is `fbc`.

param threshold: float = 0.05 in [0, inf)
  "largest relative change of the first block's residual, over the picture, that still reuses"
param warmup: int = 0 in [0, inf) "steps that compute at the beginning"
param streak: int? = off in [1, inf) "most reuses in a row"

signal head = residual(blocks[0], tokens: "latent")
signal drift = relative_l1(head, kept(head))

match blocks[1:]
  when step >= warmup while drift <= threshold at most streak in a row -> reuse residual

expect blocks[1:] over 6 steps with drift = [0, 0.01, 0.05, 0.06, 0.02, 0.2]: C R R C R C
expect blocks[1:] over 8 steps with drift = 0, warmup = 2, streak = 2: C C R R C R R C
