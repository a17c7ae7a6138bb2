policy first_block_cache
source "github.com/chengzeyi/ParaAttention"
param threshold: float = 0.05 in [0, inf)
signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while drift <= threshold -> reuse residual
