signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] when drift < 0.08 -> reuse residual
