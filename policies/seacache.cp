cachepolicy 1
policy seacache "SeaCache"
source "arXiv:2602.18993"

# TeaCache without a fitted polynomial: a filter that follows the noise level takes out of the probe what noise changes,
# so that the rest tells how much the output changes. The changes since the previous step are added up until they are
# too large.
#
# `probe` is the modulated input of the first block, as in the authors' code, which keeps the unfiltered probe at forced
# steps; here it is filtered at all steps. `beta` is 2 for pictures and 3 for videos.

param threshold: float = 0.3 in [0, inf) "smallest sum of changes that computes"
param beta: float = 2 in [0, inf) "exponent of the spectrum"
param first: int = 1 in [1, inf) "steps that compute at the beginning"
param last: int = 1 in [0, inf) "steps that compute at the end"
param streak: int? = off in [1, inf) "most reuses in a row"
param probe: list = ["^(transformer_)?blocks\.0\.norm1$"]
  "regex of the module whose output is the modulated input of the first block"

preset flux for class "^FluxTransformer2DModel$" with threshold = 0.3, beta = 2
  source "github.com/jiwoogit/SeaCache (its authors: 1.9 times as fast)"
preset flux_fast for class "^FluxTransformer2DModel$" when false with threshold = 0.6, beta = 2
  source "github.com/jiwoogit/SeaCache (its authors: 2.8 times as fast)"

signal filtered = wiener(output(probe), beta: beta)
signal change = relative_l1(filtered, prev(filtered))

match blocks
  when first <= step < steps - last while sum(change) < threshold at most streak in a row
  -> reuse residual

expect blocks over 10 steps with change = 0.12: C R R C R R C R R C
expect blocks over 10 steps with change = 0, streak = 3: C R R R C R R R C C
