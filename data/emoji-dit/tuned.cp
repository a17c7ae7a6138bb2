cachepolicy 1
policy tuned

match model on {0, 2, 5, 7, 10, 13, 17, 22, 27, 33, 39, 43, 46, 48} -> predict taylor(order: 1)
