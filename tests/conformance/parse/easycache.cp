policy easycache
signal x = input(model)
signal v = output(model)
signal rate = l1(kept(v), kept(v, 2)) / l1(kept(x), kept(x, 2))
signal change = rate * l1(x, prev(x)) / l1(kept(v))
match model when 10 <= step < steps - 1 while sum(change) < 0.05 -> reuse residual follow cond
