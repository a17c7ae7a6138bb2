let progress = step / steps
match attention when progress < 0.5 every 2 -> reuse
