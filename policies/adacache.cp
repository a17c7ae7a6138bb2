cachepolicy 1
policy adacache "AdaCache"
source "arXiv:2411.02397"

# Each computed step decides how many steps later the next one computes: the less the residual of one block changed per
# step since the computed step before, the later. The first two steps compute, since no change is known before them, and the
# last two steps compute.
#
# Left out: the regularisation by motion, which needs the layout of the frames. The codebook is that for 100 steps. The
# authors measure block 13 of 28; `probe` is to be set to the middle of a model.

param probe: int = 0 "block whose residual is measured"
param limits: list = [0.03, 0.05, 0.07, 0.09, 0.11] "changes per step, in ascending order"
param rates: list = [12, 10, 8, 6, 4, 3]
  "steps to the next computed one below each limit, and above the last"

signal r = residual(blocks[probe])
signal change = relative_l1(kept(r), kept(r, 2))

match attention or feedforward
  when step < steps - 2
  while age < (rates[0] if change / gap < limits[0] else rates[1] if change / gap < limits[1] else
    rates[2] if change / gap < limits[2] else rates[3] if change / gap < limits[3] else rates[4] if
    change / gap < limits[4] else rates[5])
  -> reuse

# A change of 0.2 in 1, 3 or 4 steps is 0.2, 0.067 and 0.05 for each step.
expect attention over 20 steps with change = 0.2, limits = [0.01, 0.02, 0.06, 0.09, 0.11],
  probe = 1: C C R R C R R R R R C R R R R R R R C C
