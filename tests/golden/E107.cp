match attention every 3 -> predict talor(order: 1)
