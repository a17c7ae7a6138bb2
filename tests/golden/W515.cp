match attention when t > 2000 every 2 -> reuse
