cachepolicy 1
policy hicache "HiCache"
source "arXiv:2508.16984"

# TaylorSeer with Hermite polynomials in place of powers: they stay small a few steps ahead, where powers grow. `scale`
# contracts them; 0.5 is HiCache++'s, 0.71 that of FreqCa's code.

param interval: int = 6 in [1, inf) "steps from one computed step to the next"
param first: int = 3 in [0, inf) "steps that compute at the beginning"
param order: int = 2 in [0, 8] "order of the expansion"
param scale: float = 0.5 in (0, inf) "contraction of the polynomials"

match attention or feedforward
  when step >= first every interval since compute -> predict hermite(order: order, scale: scale)

expect attention over 16 steps: C C C R R R R R C R R R R R C R
