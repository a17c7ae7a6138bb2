cachepolicy 2
match attention every 2 -> reuse
