match attention when 800 < t < 100 every 2 -> reuse
