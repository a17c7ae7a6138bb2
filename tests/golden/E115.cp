signal head = residual(blocks[0])
signal total = sum(relative_l1(head, prev(head)))
match blocks[1:] while total < 0.08 -> reuse residual
