cachepolicy 1
policy delta_dit "Delta-DiT"
source "arXiv:2406.01125"

# The front blocks draw the outline and the rear blocks the details. So what the rear blocks add is reused in the early
# stage, and what the front blocks add in the late stage. There is no official code; the interval and the boundary are
# the paper's for 28 blocks.

param split: int = 14 in [1, inf) "first of the rear blocks"
param boundary: float = 0.5 in [0, 1] "share of the steps after which the late stage begins"
param interval: int = 2 in [1, inf) "compute every so many steps"

let early = step < boundary * steps

match blocks[split:] when early every interval -> reuse residual
match blocks[:split] when not early every interval -> reuse residual

expect blocks[1:] over 8 steps with split = 1: C R C R C C C C
expect blocks[:1] over 8 steps with split = 1: C C C C C R C R
