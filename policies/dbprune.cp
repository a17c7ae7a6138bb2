cachepolicy 1
policy dbprune "DBPrune"
source "github.com/vipshop/cache-dit"

# Each block decides by itself: while its input stays close to what it was when the block last ran, what the block adds
# is reused. The first and last blocks always run.

param first: int = 8 in [1, inf) "blocks at the beginning that always run"
param end: int = 1000 "block after those that decide; -4 leaves four blocks at the end that always run"
param threshold: float = 0.08 in [0, inf) "smallest relative change of the input that computes"
param warmup: int = 8 in [0, inf) "steps that compute at the beginning"

signal x = input(self)
signal drift = relative_l1(x, kept(x))

match each blocks[first:end] when step >= warmup while drift < threshold -> reuse residual

expect each blocks[2:3] over 6 steps
  with first = 2, end = 3, warmup = 2, drift = [0, 0, 0.01, 0.08, 0.07, 0.1]: C C R C R C
