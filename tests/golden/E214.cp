param masks: list = ["1100", "1010"]
match feedforward mask masks by site -> reuse
