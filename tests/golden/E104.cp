param session: int = 2
match attention every session -> reuse
