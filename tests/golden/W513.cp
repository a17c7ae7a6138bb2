match attention every 1 -> reuse
