param trace: int = 2
match attention every trace -> reuse
