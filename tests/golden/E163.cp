param warmup: int = 2

match attention when step >= warmup every warmup - 2 -> reuse
