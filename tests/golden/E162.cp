param interval: int = 60 in [1, 50]
match attention every interval -> reuse
