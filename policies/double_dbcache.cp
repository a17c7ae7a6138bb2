cachepolicy 1
policy double_dbcache "DBCache for each list of blocks"
source "github.com/vipshop/cache-dit"

# DBCache as cache-dit applies it to models with two lists of blocks, as HunyuanVideo, Chroma and FLUX.2 are: each list has
# its own first and last blocks that always run, its own change and its own decision. FLUX.1's lists are one list there, for
# which `dbcache` is.

param first: int = 8 in [1, inf) "blocks of each list that always run before its span"
param end: int = 1000
  "block of each list after its span; -4 leaves four blocks at the end that always run"
param threshold: float = 0.08 in [0, inf)
  "smallest relative change of the first blocks' residual that computes"
param warmup: int = 8 in [0, inf) "steps that compute at the beginning"
param streak: int? = off in [1, inf) "most reuses in a row"
param most: int? = off in [1, inf) "most reuses of a trajectory"
param order: int = 0 in [0, 4] "order of the forecast of the residual; 0 reuses it"
param steps_mask: string? = off "a 1 for each step that must compute"

signal head = residual(blocks[0:first] of "^(transformer|double_stream)_blocks$")
signal drift = relative_l1(head, kept(head))
signal single_head = residual(blocks[0:first] of "^single_(transformer|stream)_blocks$")
signal single_drift = relative_l1(single_head, kept(single_head))

match blocks[first:end] of "^(transformer|double_stream)_blocks$"
  when step >= warmup mask steps_mask while drift < threshold at most streak in a row
  at most most in all -> predict taylor(order: order) of residual
match blocks[first:end] of "^(transformer|double_stream)_blocks$"
  when step >= warmup while drift < threshold at most streak in a row at most most in all
  -> predict taylor(order: order) of residual
match blocks[first:end] of "^single_(transformer|stream)_blocks$"
  when step >= warmup mask steps_mask while single_drift < threshold at most streak in a row
  at most most in all -> predict taylor(order: order) of residual
match blocks[first:end] of "^single_(transformer|stream)_blocks$"
  when step >= warmup while single_drift < threshold at most streak in a row at most most in all
  -> predict taylor(order: order) of residual

expect blocks[2:] of "^transformer_blocks$" over 12 steps with first = 2, warmup = 4,
  drift = [0, 0, 0, 0, 0.01, 0.09, 0.05, 0.1, 0, 0, 0, 0], single_drift = 1: C C C C R C R C R R R R
expect blocks[2:] of "^single_transformer_blocks$" over 8 steps with first = 2, warmup = 2,
  steps_mask = "11001000", drift = 1, single_drift = 0.01: C C R R C R R R
expect blocks[2:] of "^transformer_blocks$" over 8 steps with first = 2, warmup = 2,
  steps_mask = "11001000", drift = 0.01, single_drift = 1: C C R R C R R R
expect blocks[2:] of "^single_transformer_blocks$" over 5 steps with first = 2, warmup = 2,
  drift = 1, single_drift = [0, 0, 0.01, 0.09, 0.05]: C C R C R
