cachepolicy 1
policy bwcache "BWCache"
source "arXiv:2509.13789"

# The blocks reuse their outputs while their outputs changed little, on average over the blocks, between the last two
# computed steps; every Nth step computes. There is no readable code of the authors: threshold and interval are to be
# set.

param threshold: float = 0.1 in [0, inf) "largest mean change of the blocks' outputs that still reuses"
param first: int = 5 in [2, inf) "steps that compute at the beginning"
param interval: int = 4 in [1, inf) "steps from one computed step to the next at most"

signal y = output(self)
signal change = mean(relative_l1(kept(y), kept(y, 2)) over each blocks)

match each blocks when step >= first every interval since compute
  while change < threshold -> reuse

expect each blocks over 10 steps
  with first = 2, interval = 3, change = [1, 1, 0.05, 0.05, 0.05, 0.05, 0.2, 0.05, 0.2, 0.2]:
  C C R R C R C R C C
