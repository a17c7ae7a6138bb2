match attention when 100 < t < 800 every 2 -> reuse

expect attention over 6 steps: C R C R C R
