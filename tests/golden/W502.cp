signal head = residual(blocks[0])
signal drift = relative_l1(head, prev(head))
match blocks[1:] while drift < 0.08 -> reuse residual
