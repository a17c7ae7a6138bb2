signal head = residual(blocks[0])
signal drift = relative_l1(head, kept(head))
match blocks[1:] while sum(drift) < 0.08 -> reuse residual
