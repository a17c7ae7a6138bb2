cachepolicy 1
policy ucache "UCache"
source "github.com/leejet/stable-diffusion.cpp"

# EasyCache with penalties: the estimated change of the output since the last computed step is divided by the geometric
# mean of the output's size and of the moving average of its changes, grows by half with each reuse in a row, and is
# added to the sum of the reuses since then. The limit depends on how many steps the window has computed. Under sequential
# guidance the conditional call decides.
#
# Left out: sums that computed steps do not reset.

param threshold: float = 1 in [0, inf) "smallest sum of changes that computes"
param first: float = 0.15 in [0, 1] "share of the steps before the window"
param last: float = 0.95 in [0, 1] "share of the steps at which the window ends"
param decay: float = 1 in [0, 1] "what is left of the sum from one step to the next"
param early: float = 0.5 in [0, inf)
  "factor of the threshold before a fifth of the steps has computed"
param late: float = 1.5 in [0, inf) "factor of the threshold after four fifths"
param gain: float = 1.6 in [1, inf) "factor of the average change of the output"

let start = floor(first * steps)
let end = min(floor(last * steps), steps - 1)
let share = (computes - start) / steps

signal x = input(model)
signal v = output(model)
signal anchor = kept(x)
signal change = l1(kept(v), kept(v, 2))
signal size = l1(kept(v))
signal error = change / l1(anchor, kept(x, 2)) * l1(x, anchor)

# The average takes a change in once, at the first step after the compute that made it.
match model
  when start + 2 <= step < end
  while sum(error / sqrt(max(size, 1e-06) * max(gain * ema(change, 0.2 if age == 1 else 0), 1e-06))
    * (0.5 + 0.5 * age), decay: decay) < threshold * (early if share < 0.2 else late if share > 0.8
    else 1)
  -> reuse residual follow cond

# The terms of reuses in a row are 0.1, 0.15, 0.2, 0.25 and 0.3. The limit is 0.5, and 1 once the window has computed four times.
expect model over 20 steps with change = 1, size = 1.6, error = 0.16:
  C C C C C R R R C R R R C R R R R C R C
# Once 17 of the 20 steps have computed, a term of 1.25 is below the limit of 1.5.
expect model over 20 steps with first = 0, last = 1, change = 1, size = 1.6, error = 2:
  C C C C C C C C C C C C C C C C C R C C
