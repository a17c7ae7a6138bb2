signal head = residual(blocks[0])
signal summed = sum(relative_l1(head, prev(head)))
match blocks[1:] while summed < 0.08 -> reuse residual
