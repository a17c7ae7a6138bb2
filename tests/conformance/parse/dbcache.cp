policy dbcache
signal head = residual(blocks[0:8])
signal drift = relative_l1(head, kept(head))
match blocks[8:] when step >= 8 while drift < 0.08 at most 3 in a row -> predict taylor(order: 1) of residual
