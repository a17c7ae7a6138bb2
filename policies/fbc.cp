cachepolicy 1
policy first_block_cache "First Block Cache"
source "github.com/chengzeyi/ParaAttention"

# The first block always runs. While what it adds to the hidden states stays close to what it added when the rest
# of the blocks last ran, the rest would add about the same as then, too.

param threshold: float = 0.05 in [0, inf)
  "largest relative change of the first block's residual that still reuses"

signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))

match blocks[1:] while drift <= threshold -> reuse residual

# Without a history the first step computes, whatever the drift.
expect blocks[1:] over 6 steps with drift = [0, 0.01, 0.05, 0.06, 0.02, 0.2]: C R R C R C
expect blocks[1:] over 4 steps with drift = 0.1, threshold = 0.2: C R R R
