cachepolicy 1
policy foresight "Foresight"
source "arXiv:2506.00329"

# At the end of the warm-up each block gets a limit: a share of the squared change of its output between the last two
# steps. Later a block reuses its output while the change at its last computed steps was within its limit, and every Nth
# step computes.
#
# The authors' code reuses all blocks up to the last one within its limit in one jump; here, as in the paper, each block
# decides.

param gamma: float = 0.5 in [0, inf) "limit as a share of the change at the end of the warm-up"
param warmup: int = 8 in [2, inf) "steps that compute at the beginning"
param interval: int = 2 in [1, inf) "compute every so many steps"

signal y = output(self)
signal change = l2(kept(y), kept(y, 2))

match each blocks when step >= warmup every interval
  while change * change <= gamma * at_step(warmup, change * change) -> reuse

# From step 4 on: the limit is half of 1; the change is 0.7 at odd steps.
expect each blocks[2:3] over 9 steps
  with warmup = 4, change = [1, 1, 1, 1, 1, 0.7, 0.7, 0.75, 0.7]: C C C C C R C C C
