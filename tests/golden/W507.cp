param gap: int = 3
match attention every gap -> reuse
