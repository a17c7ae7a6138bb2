let late = progress > 0.5
match attention every 2 -> reuse
