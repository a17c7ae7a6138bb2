external strength: float
match attention when strength > 0.5 every 2 -> reuse
