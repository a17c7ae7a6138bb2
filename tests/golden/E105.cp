match attention when median(progress) < 1 every 2 -> reuse
