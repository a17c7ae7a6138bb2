match model when uncond_skipped every 2 -> reuse
