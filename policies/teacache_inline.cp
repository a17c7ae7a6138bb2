cachepolicy 1
policy teacache_inline "TeaCache, modulation inside the block"
source "arXiv:2411.19108"

# TeaCache for models whose blocks modulate their input by themselves, so that no module gives the modulated input. It is
# what goes into the first attention.

param threshold: float = 0.1 in [0, inf) "smallest sum of changes that computes"
param coefficients: list "the polynomial, highest power first"
param probe: list = ["^transformer_blocks\.0\.attn1$"] "regex of the first attention"

# Open-Sora and Open-Sora-Plan have classes of their own, not of diffusers.
preset ltx_video for class "^LTXVideoTransformer3DModel$"
  with coefficients = [21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326],
  threshold = 0.03
  source
    "github.com/ali-vilab/TeaCache/tree/main/TeaCache4LTX-Video (its authors: 1.6 times as fast)"
preset latte for class "^LatteTransformer3DModel$"
  with coefficients = [-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402],
  threshold = 0.1 source "github.com/ali-vilab/TeaCache/tree/main/eval/teacache"
preset open_sora for class "^STDiT3$"
  with coefficients = [217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624],
  threshold = 0.1, probe = ["^spatial_blocks\.0\.attn$"]
  source "github.com/ali-vilab/TeaCache/tree/main/eval/teacache (its authors: 1.4 times as fast)"
preset open_sora_plan for class "^OpenSoraT2V$"
  with coefficients = [205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469],
  threshold = 0.1 source "github.com/ali-vilab/TeaCache/tree/main/eval/teacache"

signal modulated = input(probe)
signal change = poly(coefficients, relative_l1(modulated, prev(modulated)))

match blocks when 0 < step < steps - 1 while sum(change) < threshold -> reuse residual

expect blocks over 9 steps with change = 0.04, threshold = 0.1: C R R C R R C R C
