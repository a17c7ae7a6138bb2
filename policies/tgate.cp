cachepolicy 1
policy tgate "T-GATE"
source "arXiv:2404.02747"

# What cross-attention gives settles early. Before the gate, self-attention is reused between some steps; at the gate
# the mean of both halves of what cross-attention gave last stays for the rest of the trajectory, and guidance ends.
#
# The authors' code also runs the steps after the gate with the negative prompt, which shows where a model reads the prompt
# outside of cross-attention; here they run with the prompt. Guidance in two calls a step computes cross-attention.

param gate: int = 10 in [1, inf) "first step without guidance"
param warmup: int = 2 in [0, inf) "last step of the warm-up, which computes"
param interval: int = 5 in [1, inf) "before the gate: compute self-attention every so many steps"
param late_interval: int? = off in [1, inf)
  "from the gate on: compute self-attention every so many steps; off: at every step"

match model when step >= gate -> approximate uncond copy
match cross_attention when step >= gate -> reuse mean
match self_attention when step >= gate and step - age == gate - 1 every late_interval -> reuse mean
match self_attention when step >= gate every late_interval -> reuse
match self_attention when warmup < step < gate - 1 every interval -> reuse

expect self_attention and "^transformer_blocks" over 16 steps: C C C R R C R R R C C C C C C C
expect cross_attention over 16 steps: C C C C C C C C C C R R R R R R
expect model over 16 steps: C C C C C C C C C C R R R R R R
expect self_attention and "^transformer_blocks" over 16 steps with late_interval = 3, gate = 8:
  C C C R R C R C R C R R C R R C
