match attention when abs(t, 500) < 100 every 2 -> reuse
