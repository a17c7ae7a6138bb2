cachepolicy 1
policy fora "Fast-forward caching of attention and MLP"
source "arXiv:2407.01425"

param interval: int = 3 in [1, 50]  "compute every so many steps"

match attention or feedforward every interval from end -> reuse

expect attention over 8 steps: C C R R C R R C
