match attention every 2 -> reuse
match self_attention when t > 500 every 3 -> reuse
