cachepolicy 1
policy double_fbc "Double First Block Cache"
source "github.com/nunchaku-tech/nunchaku"

# First Block Cache for each of the two lists of blocks of FLUX and its relatives: each has its own first block that
# always runs, its own threshold and its own decision.

param multi: float = 0.09 in [0, inf) "largest relative change in the blocks of two streams"
param single: float = 0.12 in [0, inf) "largest relative change in the blocks of one stream"

preset flux for class "^FluxTransformer2DModel$" with multi = 0.09, single = 0.12
  source
    "github.com/nunchaku-tech/nunchaku"

signal multi_head = residual(blocks[0] of "^transformer_blocks$")
signal multi_drift = relative_l1(multi_head, kept(multi_head))
signal single_head = residual(blocks[0] of "^single_transformer_blocks$")
signal single_drift = relative_l1(single_head, kept(single_head))

match blocks[1:] of "^transformer_blocks$" while multi_drift < multi -> reuse residual
match blocks[1:] of "^single_transformer_blocks$" while single_drift < single -> reuse residual

expect blocks[1:] of "^transformer_blocks$" over 4 steps with multi_drift = [0, 0.05, 0.1, 0.09],
  single_drift = 0: C R C C
expect blocks[1:] of "^single_transformer_blocks$" over 4 steps
  with single_drift = [0, 0.05, 0.13, 0.1], multi_drift = 1: C R C R
