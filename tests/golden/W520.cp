match attention every 2 -> reuse
match feedforward every 3 -> reuse

expect attention over 4 steps: C R C R
