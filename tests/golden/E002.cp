match attention when t < 800 && step > 2 -> reuse
