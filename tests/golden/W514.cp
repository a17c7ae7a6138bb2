match attention when branch == "condd" every 2 -> reuse
