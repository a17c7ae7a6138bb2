match blocks[20:] every 2 -> reuse
