policy taylorseer            # the authors' schedule; diffusers': every 5 offset 4, attention only
match attention or feedforward when step >= 3 every 5 since compute -> predict taylor(order: 1)
