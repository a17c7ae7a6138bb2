match attention every 0 -> reuse
