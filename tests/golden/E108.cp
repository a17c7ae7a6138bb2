match attention every 3 -> predict linear(wight: 0.5)
