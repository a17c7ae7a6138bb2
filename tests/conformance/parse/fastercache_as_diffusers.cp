policy fastercache_as_diffusers
param names: list = ["attn"]
match model when t in (-1, 641) every 5 -> approximate uncond spectral(
  low: 1.1 if t in (99, 901) else 1, high: 1.1 if t in (-1, 301) else 1, layout: "uncond first")
match self_attention and names when t in (-1, 681) and uncond_skipped every 2
  -> predict linear(weight: 0.5, feedback: true)
