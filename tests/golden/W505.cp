match attention every 2 + step / 10 -> reuse
