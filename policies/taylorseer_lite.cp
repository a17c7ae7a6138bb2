cachepolicy 1
policy taylorseer_lite "TaylorSeer-Lite"
source "arXiv:2503.06923"

# TaylorSeer on one tensor: the hidden states after the last block are forecast, and no block runs. The history is that of
# one stream in place of two for each block.

param interval: int = 6 in [1, inf) "steps from one computed step to the next"
param first: int = 3 in [0, inf) "steps that compute at the beginning"
param order: int = 1 in [0, 8] "order of the expansion"

match blocks when step >= first every interval since compute -> predict taylor(order: order)

expect blocks over 16 steps: C C C R R R R R C R R R R R C R
