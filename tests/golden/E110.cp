table ratios = [1.0, 0.98, 0.97]
match attention when ratios < 1 every 2 -> reuse
