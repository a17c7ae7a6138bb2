match blocks[1:] and "^single_" every 2 -> reuse
