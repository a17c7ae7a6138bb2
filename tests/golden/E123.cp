match attention every 5 -> approximate uncond spectral(low: 1.1, high: 1, layout: "uncond first")
