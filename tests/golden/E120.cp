param interval: int? = 2
match attention every interval + 1 -> reuse
