mach attention every 2 -> reuse
