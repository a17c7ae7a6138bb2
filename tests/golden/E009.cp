policy fora
cachepolicy 1
