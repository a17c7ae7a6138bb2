match blocks of "to_out" every 2 -> reuse
