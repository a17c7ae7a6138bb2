match optional "^down_blocks" every 2 -> reuse
