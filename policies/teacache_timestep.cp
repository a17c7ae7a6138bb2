cachepolicy 1
policy teacache_timestep "TeaCache by the timestep"
source "arXiv:2411.19108"

# TeaCache where the probe is the timestep itself, so that nothing is measured and the steps are known ahead.

param threshold: float = 0.17 in [0, inf) "smallest sum of changes that computes"
param coefficients: list = [-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901]
  "the polynomial, highest power first; these are HiDream-I1-Full's"

preset hidream_full for class "^HiDreamImageTransformer2DModel$"
  with coefficients = [-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901],
  threshold = 0.17
  source
    "github.com/ali-vilab/TeaCache/tree/main/TeaCache4HiDream-I1 (its authors: 1.5 times as fast)"

match blocks
  when 0 < step < steps - 1 while sum(poly(coefficients, abs(t - prev(t)) / prev(t))) < threshold
  -> reuse residual

expect blocks over 8 steps with t = [1000, 950, 900, 850, 800, 750, 700, 650],
  coefficients = [1, 0], threshold = 0.1: C R C R C R C C
expect blocks over 9 steps with t = [1000, 950, 900, 850, 800, 750, 700, 650, 600],
  coefficients = [1, 0], threshold = 0.1: C R C R C R C R C
