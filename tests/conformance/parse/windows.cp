cachepolicy 1
policy windows

match attention
	when t < 800 # tab

  every 2
  -> reuse
match feedforward -> reuse