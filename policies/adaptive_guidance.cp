cachepolicy 1
policy adaptive_guidance "Adaptive Guidance"
source "arXiv:2312.12487"

# Guidance runs until both predictions of a step point in nearly the same direction; from the next step on, for good, only
# the conditional prediction is computed and stands for both. In other forms guidance is limited to an interval of steps
# (arXiv:2404.07724) or to a share of them, as by the guiders of diffusers.
#
# Where guidance runs in two calls, the conditional one has to come first; otherwise both compute. A batch of both computes
# at the first step, before it is known that a step has one call.

param gamma: float = 0.99 "cosine of both predictions that ends guidance; above 1: it never ends"
param first: int = 0 in [0, inf) "first step with guidance"
param last: float = inf "last step with guidance"
param start: float = 0 in [0, 1] "share of the steps before guidance"
param stop: float = 1 in [0, 1] "share of the steps at which guidance ends"

# These are chosen by their names. The interval is that of EDM2-XXL's best FID, in 32 steps of Heun's method; the gate is
# T-GATE's, step 10 of 25.
preset guidance_interval for class "." when false with gamma = 2, first = 17, last = 22
  source "github.com/kynkaat/guidance-interval"
preset cfg_gate for class "." when false with gamma = 2, stop = 0.4
  source "github.com/HaozheLiu-ST/T-GATE"

signal v = output(model)
signal alike = cosine(cross(cond, prev(v)), cross(uncond, prev(v)))

match model when not first <= step <= last -> approximate uncond copy
match model when not floor(start * steps) <= step < floor(stop * steps) -> approximate uncond copy
match model while latch(alike >= gamma) -> approximate uncond copy

expect model over 8 steps with alike = [0, 0.5, 0.9, 0.98, 0.99, 0.5, 0.5, 0]: C C C C R R R R
expect model over 6 steps with alike = 0, first = 1, last = 3: R C C C R R
expect model over 10 steps with alike = 0, start = 0.2, stop = 0.75: R R C C C C C R R R
