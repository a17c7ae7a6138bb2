cachepolicy 1
policy spectrum "Spectrum"
source "arXiv:2603.01623"

# The hidden states after the last block are forecast by Chebyshev polynomials of the step, fitted to the last computed
# results by ridge regression and mixed with the newest result plus half of its last change. The distance from one computed
# step to the next grows: by one every second time. The first and the last steps compute.
#
# stable-diffusion.cpp has `order = 3, ridge = 1, mix = 0.4, first = 4` and forecasts the output after guidance. Its axis is
# step / 50, whatever the number of steps; here it is step / steps, which is the same for 50.

param first: int = 5 in [2, inf) "steps that compute at the beginning"
param stop: float = 0.9 in [0, 1] "share of the trajectory after which all steps compute"
param window: float = 2 in [1, inf) "steps from one computed step to the next, at first"
param flex: float = 0.5 in [0, inf) "how much this grows with each computed step"
param order: int = 4 in [0, 8] "order of the polynomials"
param ridge: float = 0.1 in [0, inf) "weight of the ridge"
param mix: float = 0.5 in [0, 1] "share of the fitted polynomials"
param results: int = 6 in [2, 16] "how many computed results are fitted"

match blocks
  when first <= step < floor(stop * steps)
  every floor(window + flex * (computes - first)) since compute
  -> predict chebyshev(order: order, ridge: ridge, mix: mix, window: results)

expect blocks over 28 steps: C C C C C R C R C R R C R R C R R R C R R R C R R C C C
expect blocks over 20 steps with first = 2, flex = 0, window = 3, stop = 0.5:
  C C R R C R R C R R C C C C C C C C C C
