cachepolicy 1
policy magcache "MagCache"
source "arXiv:2506.09045"

# The magnitude of what the blocks add shrinks from step to step by a ratio that hardly depends on the prompt. The
# product of the ratios since the last computed step tells how far a reused residual is off; the error of each reuse is
# its distance from 1, and the sum of the errors is bounded. The ratios belong to a model and are measured once
# (`cachepolicy calibrate`).
#
# diffusers compares with `<=`, as this file does; the authors' code for Wan compares with `<`.

param threshold: float = 0.06 in [0, inf) "largest sum of errors that still reuses"
param skips: int = 3 in [1, inf) "most reuses in a row"
param retention: float = 0.2 in [0, 1] "share of the steps that compute at the beginning"
param ratios: list = [1]
  "ratio of the residual's magnitude to that of the step before, a number for each step"

# The authors' code leaves out one step of FLUX.1's table.
preset flux for class "^FluxTransformer2DModel$" with threshold = 0.24, skips = 5, retention = 0.1,
  ratios = [1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125,
    1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609,
    0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062]
  source "github.com/Zehong-Ma/MagCache"

match blocks
  when step >= retention * steps + 0.5 - (retention * steps + 0.5) % 1
  while sum(abs(1 - product(ratios[step]))) <= threshold at most skips in a row -> reuse residual

expect blocks over 10 steps: C C R R R C R R R C
