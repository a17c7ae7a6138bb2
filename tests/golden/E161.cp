param interval: int = 2.5
match attention every interval -> reuse
