match attention every 2 when 100 < t < 800 -> reuse
