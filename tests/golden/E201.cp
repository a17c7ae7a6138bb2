match blocks[40] every 2 -> reuse
