# ‮never mind
match attention every 2 -> reuse
