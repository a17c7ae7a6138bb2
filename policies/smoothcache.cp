cachepolicy 1
policy smoothcache "SmoothCache"
source "arXiv:2411.10510"

# A schedule for each kind of module, made once for a model and a number of steps: after a computed step, as many steps
# reuse, up to three, as keep the error that was measured then below a limit. `cachepolicy calibrate` makes schedules.

param self_attention_mask: string? = off "a 1 for each step at which self-attention computes"
param cross_attention_mask: string? = off "a 1 for each step at which cross-attention computes"
param feedforward_mask: string? = off "a 1 for each step at which feed-forward modules compute"

# The authors' schedules for DiT-XL/2 at 256 by 256. They are chosen by their names, since each is for a number of steps.
preset dit_50_alpha_0_08 for class "^DiTTransformer2DModel$" when false
  with self_attention_mask = "10010101111111111111111111111111111111111111111111",
  feedforward_mask = "10010101111111111111111111111111111111111111111111"
  source "github.com/Roblox/SmoothCache"
preset dit_50_alpha_0_18 for class "^DiTTransformer2DModel$" when false
  with self_attention_mask = "10001001001010101010101010101010101010101010101011",
  feedforward_mask = "10001001001010101010101010101010101010101010101011"
  source "github.com/Roblox/SmoothCache"
preset dit_30_alpha_0_35 for class "^DiTTransformer2DModel$" when false
  with self_attention_mask = "100101010101010101010101010111",
  feedforward_mask = "100101010101010101010101010111" source "github.com/Roblox/SmoothCache"

match optional self_attention mask self_attention_mask -> reuse
match optional cross_attention mask cross_attention_mask -> reuse
match optional feedforward mask feedforward_mask -> reuse

expect self_attention over 8 steps with self_attention_mask = "10010101": C R R C R C R C
expect cross_attention over 8 steps with cross_attention_mask = "10110101": C R C C R C R C
expect feedforward over 8 steps with feedforward_mask = "10010111": C R R C R C C C
