policy teacache
param coefficients: list = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]
param threshold: float = 0.25
signal modulated = output("^transformer_blocks\.0\.norm1$")
signal change = poly(coefficients, relative_l1(modulated, prev(modulated)))
match blocks when 0 < step < steps - 1 while sum(change) < threshold -> reuse residual
