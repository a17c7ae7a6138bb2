cachepolicy 1
policy freqca "FreqCa"
source "arXiv:2510.08669"

# The hidden states after the last block are split by frequency over the picture. The low frequencies, which stay alike from step
# to step, are those of the last computed step; the high ones, which move smoothly, are forecast by HiCache's polynomials.
#
# `transform = "dct"` is of the grid of the tokens, as in the authors' code for FLUX; `"fft"` is of the sequence of the tokens, as
# for Qwen-Image. A sequence without a known grid, such as the prompt's, is split along itself. The authors take differences
# from the step before the last of the first ones on, so that their order 2 begins one computed step later. Their look-ahead
# that rewinds steps is not expressed.

param interval: int = 6 in [1, inf)
  "steps from one computed step to the next; the authors have 6 to 9"
param first: int = 3 in [0, inf) "steps that compute at the beginning"
param cut: float = 0.1 in [0, 1] "share of the highest frequency up to which frequencies are low"
param order: int = 2 in [0, 8] "order of the forecast of the high frequencies"
param scale: float = 0.71 in (0, inf) "contraction of the polynomials"
param transform: string = "dct" in {"dct", "fft"} "of the grid of the tokens, or of their sequence"

match blocks
  when step >= first every interval since compute
  -> predict band(transform: transform, cut: cut, low: taylor(order: 0), high: hermite(order: order,
    scale: scale))

expect blocks over 16 steps: C C C R R R R R C R R R R R C R
expect blocks over 8 steps with interval = 3, first = 1: C R R C R R C R
