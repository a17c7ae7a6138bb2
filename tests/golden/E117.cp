match attention every 2 -> reuse
expect attention over 8 steps: C R C R C R C
