cachepolicy 1
policy bdf2 "FoCa's predictor"
source "arXiv:2508.16211"

# FoCa takes the features of the steps as the solution of a differential equation: a step of BDF2 with the slope of the last
# two computed results, then a corrector that takes the mean of the slopes at both ends.
#
# Where the slope is that of two results, divided by the steps between them, this step is linear extrapolation, and both slopes
# of the corrector are equal, so that it changes nothing. The port in cache-dit does not divide by these steps and damps
# predictions more than 3 steps ahead; on a line it is off by up to a half. The schedule is TaylorSeer's.

param interval: int = 5 in [1, inf) "steps from one computed step to the next"
param first: int = 3 in [0, inf) "steps that compute at the beginning"

match attention or feedforward when step >= first every interval since compute -> predict bdf2

expect attention over 16 steps: C C C R R R R C R R R R C R R R
expect feedforward over 6 steps with first = 1, interval = 2: C R C R C R
