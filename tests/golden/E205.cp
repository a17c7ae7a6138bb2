match blocks of "^layers$" every 2 -> reuse
