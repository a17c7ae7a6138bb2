match blocks[1:] while l1(residual(blocks[0])) < 0.08 -> reuse residual
