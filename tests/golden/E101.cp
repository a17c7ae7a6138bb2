match attention when stp < 3 -> reuse
