match attention when 100 < t > 800 every 2 -> reuse
