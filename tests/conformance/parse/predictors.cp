cachepolicy 1
policy predictors "Each predictor with all its arguments"

param order: int = 2 in [0, 8]

external push: float
signal head = residual(blocks[0])

match "attn1" every 2 -> predict linear(weight: 0.5 * push, feedback: true)
match "attn2" every 3 -> predict taylor(order: order, scale: 0.9, along: "sigma")
match "ff" every 4 -> predict hermite(order: 1, scale: 1 / age, along: "t") of residual
match each blocks[:2] every 3 -> predict newton(order: order, along: "t")
match each blocks[2:4] every 3 -> predict chebyshev(order: 4, ridge: 0.1, mix: 0.5, window: 6)
match each blocks[4:6] every 3 -> predict bdf2(along: "step")
match each blocks[6:7] every 3 -> predict weights(of: [2, -age / gap, 0.5], feedback: false)
match blocks[1:] while computes > 2 -> predict align(probe: head, clip: [1, 1.5]) of residual
match model
  every 5
  -> predict band(transform: "dct", cut: 0.1, low: taylor(order: 0), high: hermite(order: order,
    scale: 0.71))

expect model over 6 steps with push = 1, sigma = 0.5: C R R R R C
