signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))

match blocks while drift < 0.05 -> reuse residual
