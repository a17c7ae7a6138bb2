cachepolicy 1
policy teacache "TeaCache"
source "arXiv:2411.19108"

# How much the input of the first block changes from one step to the next, after the modulation by the timestep, tells
# how much the output changes: a polynomial, fitted once for a model, makes the one of the other. The changes are
# added up until they are too large. The first and the last step compute.
#
# The polynomial is neither clamped nor made positive, as in the authors' code, so a sum can fall.

param threshold: float = 0.25 in [0, inf) "smallest sum of changes that computes"
param coefficients: list = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861]
  "the polynomial, highest power first; these are FLUX.1's"
param probe: list = ["^(transformer_)?blocks\.0\.norm1$"]
  "regex of the module whose output is the modulated input of the first block"

signal modulated = output(probe)
signal change = poly(coefficients, relative_l1(modulated, prev(modulated)))

match blocks when 0 < step < steps - 1 while sum(change) < threshold -> reuse residual

expect blocks over 10 steps with change = 0.1: C R R C R R C R R C
