signal head = residual(block)
signal drift = relative_l1(head, kept(head))

match blocks[1:] while drift < 0.05 -> reuse residual
