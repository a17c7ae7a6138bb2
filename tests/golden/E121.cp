match attention every 3 -> predict taylor(order: step)
