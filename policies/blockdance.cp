cachepolicy 1
policy blockdance "BlockDance"
source "arXiv:2503.15927"

# Late in the sampling the structure of the picture is settled: the output of the first blocks is reused, and only the
# blocks after them run. There is no official code; `depth` and `begin` are the paper's for PixArt and SD3.

param depth: int = 20 in [1, inf) "blocks that are reused"
param begin: float = 0.4 in [0, 1] "share of the steps that compute at the beginning"
param interval: int = 2 in [1, inf) "compute every so many steps"

match blocks[:depth] when step > begin * steps every interval -> reuse

expect blocks[:1] over 10 steps with depth = 1: C C C C C R C R C R
