match attention when floor(progress) < 1 every 2 -> reuse
