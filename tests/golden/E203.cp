match blocks[0:4] every 2 -> reuse residual
match blocks[2:6] every 3 -> reuse residual
