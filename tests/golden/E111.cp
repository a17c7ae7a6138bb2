signal head = residual(blocks[0])
match blocks[1:] while head < 0.08 -> reuse residual
