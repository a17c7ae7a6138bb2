cachepolicy 1
policy magcache "MagCache"
source "arXiv:2506.09045"

# The magnitude of what the blocks add shrinks from step to step by a ratio that hardly depends on the prompt. The
# product of the ratios since the last computed step tells how far a reused residual is off; the error of each reuse is
# its distance from 1, and the sum of the errors is bounded. The ratios belong to a model and are measured once
# (`cachepolicy calibrate`).
#
# diffusers compares with `<=`, as this file does; the authors' code for Wan compares with `<`.

param threshold: float = 0.06 in [0, inf) "largest sum of errors that still reuses"
param skips: int = 3 in [1, inf) "most reuses in a row"
param retention: float = 0.2 in [0, 1] "share of the steps that compute at the beginning"
param ratios: list = [1]
  "ratio of the residual's magnitude to that of the step before, a number for each step"

# The authors' code leaves out one step of FLUX.1's table. For models with guidance the authors have a table for each
# branch; the ratios here are those of the conditional one. A preset that configurations do not tell from another one
# is chosen by name alone: Kontext, Qwen-Image-Edit, Wan's I2V models. The experts of Wan 2.2's 14B have the configuration
# of Wan 2.1's and get its table, which was not made for them.
preset flux for class "^FluxTransformer2DModel$" with threshold = 0.24, skips = 5, retention = 0.1,
  ratios = [1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125,
    1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609,
    0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062]
  source "github.com/Zehong-Ma/MagCache/tree/main/MagCache4FLUX (its authors: 2.8 times as fast)"
preset flux_kontext for class "^FluxTransformer2DModel$" when false with threshold = 0.05,
  skips = 4, retention = 0.2,
  ratios = [1.0, 1.19531, 1.07812, 1.02344, 1.03125, 1.00781, 1.02344, 1.01562, 1.01562, 1.0,
    1.01562, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 0.99609, 1.01562, 0.99219, 1.0, 0.99219,
    0.98438, 0.99609, 0.96484, 0.96094, 0.9375, 0.93359]
  source
    "github.com/Zehong-Ma/MagCache/tree/main/MagCache4FLUX_Kontext (its authors: 2 times as fast)"
preset chroma for class "^ChromaTransformer2DModel$" with threshold = 0.1, skips = 2,
  retention = 0.25,
  ratios = [1.0, 1.00781, 1.03906, 1.05469, 1.07031, 1.04688, 1.03906, 1.03906, 1.01562, 1.05469,
    0.99609, 1.02344, 1.01562, 0.99609, 1.0, 0.99219, 1.00781, 1.00781, 0.97656, 0.98828, 0.97266,
    1.0, 0.93359, 0.94922, 0.92578, 1.0625]
  source "github.com/Zehong-Ma/ComfyUI-MagCache"
preset qwen_image for class "^QwenImageTransformer2DModel$" with threshold = 0.06, skips = 2,
  retention = 0.2,
  ratios = [1.0, 1.64062, 1.45312, 1.1875, 1.17188, 1.05469, 1.21094, 1.10938, 1.11719, 1.13281,
    1.11719, 1.07812, 1.07031, 1.08594, 1.08594, 1.07812, 1.03906, 1.04688, 1.07812, 1.07031,
    1.03125, 1.07812, 1.04688, 1.04688, 1.04688, 1.03906, 1.01562, 1.03125, 1.02344, 1.02344,
    1.02344, 1.03906, 1.0, 1.01562, 1.0, 0.99219, 1.00781, 0.98047, 0.95703, 0.96875, 0.99219,
    0.92578, 0.92578, 0.90625, 0.85938, 0.80469, 0.87891, 0.75, 0.60938, 0.55078]
  source
    "github.com/Zehong-Ma/MagCache/tree/main/MagCache4QwenImage (its authors: 1.5 times as fast)"
preset qwen_image_edit for class "^QwenImageTransformer2DModel$" when false with threshold = 0.06,
  skips = 2, retention = 0.2,
  ratios = [1.0, 1.41406, 1.09375, 1.3125, 1.20312, 1.0625, 1.125, 1.14062, 1.17969, 1.09375,
    1.10938, 1.10938, 1.07031, 1.04688, 1.09375, 1.03906, 1.0625, 1.04688, 1.0625, 1.04688, 1.07031,
    1.03125, 1.03906, 1.03906, 1.02344, 1.01562, 1.03125, 1.00781, 1.01562, 1.00781, 1.01562, 1.0,
    1.0, 0.98828, 0.98047, 0.98047, 0.97266, 0.92578, 0.94922, 0.98438, 0.89844, 0.91797, 0.92188,
    0.84375, 0.82812, 0.78516, 0.87891, 0.71094, 0.56641, 0.50781]
  source
    "github.com/Zehong-Ma/MagCache/tree/main/MagCache4QwenImageEdit (its authors: 1.5 times as fast)"
preset hunyuan_video for class "^HunyuanVideoTransformer3DModel$" with threshold = 0.24, skips = 6,
  retention = 0.2,
  ratios = [1.0, 1.0754, 1.27807, 1.11596, 1.09504, 1.05188, 1.00844, 1.05779, 1.00657, 1.04142,
    1.03101, 1.00679, 1.02556, 1.00908, 1.06949, 1.05438, 1.02214, 1.02321, 1.03019, 1.00779,
    1.03381, 1.01886, 1.01161, 1.02968, 1.00544, 1.02822, 1.00689, 1.02119, 1.0105, 1.01044,
    1.01572, 1.02972, 1.0094, 1.02368, 1.0226, 0.98965, 1.01588, 1.02146, 1.0018, 1.01687, 0.99436,
    1.00283, 1.01139, 0.97122, 0.98251, 0.94513, 0.97656, 0.90943, 0.85703, 0.75456]
  source
    "github.com/Zehong-Ma/MagCache/tree/main/MagCache4HunyuanVideo (its authors, 720 lines: 2.8 times as fast)"
preset hunyuan_video_540 for class "^HunyuanVideoTransformer3DModel$" when false
  with threshold = 0.24, skips = 6, retention = 0.2,
  ratios = [1.0, 1.06971, 1.29073, 1.11245, 1.09596, 1.05233, 1.01415, 1.05672, 1.00848, 1.03632,
    1.02974, 1.00984, 1.03028, 1.00681, 1.06614, 1.05022, 1.02592, 1.01776, 1.02985, 1.00726,
    1.03727, 1.01502, 1.00992, 1.03371, 0.9976, 1.02742, 1.0093, 1.01869, 1.00815, 1.01461, 1.01152,
    1.03082, 1.0061, 1.02162, 1.01999, 0.99063, 1.01186, 1.0217, 0.99947, 1.01711, 0.9904, 1.00258,
    1.00878, 0.97039, 0.97686, 0.94315, 0.97728, 0.91154, 0.86139, 0.76592]
  source
    "github.com/Zehong-Ma/MagCache/tree/main/MagCache4HunyuanVideo (its authors, 540 lines: 2.8 times as fast)"
preset hunyuan_video_1_5 for class "^HunyuanVideo15Transformer3DModel$" with threshold = 0.03,
  skips = 2, retention = 0.25,
  ratios = [1.0, 1.01172, 0.9873, 1.01465, 0.99805, 0.99512, 0.99512, 0.99316, 0.99365, 0.99316,
    0.99268, 0.9917, 0.99023, 0.98828, 0.98633, 0.9834, 0.97949, 0.97363, 0.96436, 0.94824]
  source "github.com/Zehong-Ma/ComfyUI-MagCache (20 steps)"
preset wan_t2v_1_3b for class "^WanTransformer3DModel$" when num_layers == 30 and in_channels == 16
  with threshold = 0.12, skips = 4, retention = 0.2,
  ratios = [1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957,
    0.99511, 0.99535, 0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415,
    0.99419, 0.99396, 0.99388, 0.99349, 0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068,
    0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836, 0.98202, 0.97977, 0.97717, 0.9741,
    0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821, 0.81838]
  source "github.com/Zehong-Ma/MagCache/tree/main/MagCache4Wan2.1"
preset wan_t2v_14b for class "^WanTransformer3DModel$" when num_layers == 40 and in_channels == 16
  with threshold = 0.24, skips = 6, retention = 0.2,
  ratios = [1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434,
    0.99533, 0.99468, 0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347,
    0.99418, 0.99271, 0.99313, 0.99215, 0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996,
    0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037, 0.97678, 0.97546, 0.97184,
    0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111]
  source
    "github.com/Zehong-Ma/MagCache/tree/main/MagCache4Wan2.1 (its authors, 720 lines: 2.8 times as fast)"
preset wan_i2v_480 for class "^WanTransformer3DModel$" when false with threshold = 0.24, skips = 6,
  retention = 0.2,
  ratios = [1.0, 0.98783, 0.97559, 0.98311, 0.98202, 0.9888, 0.98762, 0.98957, 0.99052, 0.99383,
    0.98857, 0.99065, 0.98845, 0.99057, 0.98957, 0.98601, 0.98823, 0.98756, 0.98808, 0.98721,
    0.98571, 0.98543, 0.98157, 0.98411, 0.97952, 0.98149, 0.9774, 0.97825, 0.97355, 0.97085,
    0.97056, 0.96588, 0.96113, 0.9567, 0.94961, 0.93973, 0.93217, 0.91878, 0.90955, 0.92617]
  source "github.com/Zehong-Ma/MagCache/tree/main/MagCache4Wan2.1"
preset wan_i2v_720 for class "^WanTransformer3DModel$" when false with threshold = 0.24, skips = 6,
  retention = 0.2,
  ratios = [1.0, 0.99428, 0.98588, 0.98273, 0.99018, 0.98911, 0.98646, 0.99454, 0.9891, 0.99124,
    0.99102, 0.99215, 0.99515, 0.99576, 0.99068, 0.99097, 0.99166, 0.99041, 0.99201, 0.99101,
    0.98599, 0.98845, 0.98848, 0.98862, 0.98718, 0.98497, 0.98264, 0.98389, 0.97938, 0.97535,
    0.97498, 0.973, 0.96827, 0.96261, 0.95335, 0.94649, 0.93397, 0.91636, 0.89088, 0.8679]
  source "github.com/Zehong-Ma/MagCache/tree/main/MagCache4Wan2.1"
preset wan_vace_1_3b for class "^WanVACETransformer3DModel$" when num_layers == 30
  with threshold = 0.02, skips = 3, retention = 0.2,
  ratios = [1.0, 1.00129, 1.00056, 0.99776, 0.99726, 0.99725, 0.9958, 0.99703, 0.99863, 0.99735,
    0.99714, 0.99697, 0.9969, 0.99695, 0.99697, 0.99608, 0.99721, 0.99649, 0.99659, 0.99727,
    0.99603, 0.99652, 0.99635, 0.9958, 0.99581, 0.99573, 0.99531, 0.99505, 0.99481, 0.99426,
    0.99403, 0.99357, 0.99302, 0.99243, 0.9916, 0.99085, 0.98985, 0.98857, 0.98717, 0.98551,
    0.98301, 0.9805, 0.97635, 0.97183, 0.96496, 0.95526, 0.94102, 0.91809, 0.87871, 0.80141]
  source "github.com/Zehong-Ma/MagCache/tree/main/MagCache4Wan2.1"
preset wan_vace_14b for class "^WanVACETransformer3DModel$" when num_layers == 40
  with threshold = 0.02, skips = 3, retention = 0.2,
  ratios = [1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434,
    0.99533, 0.99468, 0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347,
    0.99418, 0.99271, 0.99313, 0.99215, 0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996,
    0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037, 0.97678, 0.97546, 0.97184,
    0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111]
  source "github.com/Zehong-Ma/MagCache/tree/main/MagCache4Wan2.1"
preset wan_2_2_ti2v_5b for class "^WanTransformer3DModel$"
  when num_layers == 30 and in_channels == 48 with threshold = 0.06, skips = 2, retention = 0.2,
  ratios = [1.0, 0.99505, 0.99441, 0.99558, 0.99499, 0.99534, 0.99468, 0.99463, 0.9946, 0.99408,
    0.9945, 0.99409, 0.99403, 0.99382, 0.99349, 0.99377, 0.9933, 0.99303, 0.99217, 0.992, 0.99201,
    0.99133, 0.99112, 0.99155, 0.98958, 0.98959, 0.98838, 0.98826, 0.9883, 0.98711, 0.98562,
    0.98511, 0.98414, 0.98284, 0.98104, 0.97981, 0.97849, 0.97557, 0.97398, 0.97171, 0.96917,
    0.96511, 0.96263, 0.95839, 0.95483, 0.94942, 0.9468, 0.94583, 0.94843, 0.96949]
  source "github.com/Zehong-Ma/MagCache/tree/main/MagCache4Wan2.2"
preset flux_kontext_20 for class "^FluxTransformer2DModel$" when false with threshold = 0.05,
  skips = 4, retention = 0.2,
  ratios = [1.0, 1.21875, 1.0625, 1.03125, 1.03125, 1.0, 1.00781, 1.03906, 0.98047, 1.03125,
    0.96875, 1.02344, 1.0, 0.99219, 1.02344, 0.98047, 0.95703, 0.98828, 0.98047, 0.88672]
  source "github.com/Zehong-Ma/ComfyUI-MagCache (20 steps)"
preset qwen_image_40 for class "^QwenImageTransformer2DModel$" when false with threshold = 0.1,
  skips = 2, retention = 0.2,
  ratios = [1.0, 1.6875, 1.25, 1.34375, 1.11719, 1.10938, 1.13281, 1.14062, 1.10156, 1.14844,
    1.07812, 1.09375, 1.07812, 1.07812, 1.10156, 1.07031, 1.07812, 1.03906, 1.08594, 1.07031,
    1.07031, 1.05469, 1.0625, 1.03125, 1.03906, 1.04688, 1.02344, 1.03906, 1.03125, 1.01562,
    1.01562, 0.98828, 0.99219, 0.94922, 0.98047, 0.88672, 0.89062, 0.78125, 0.74219, 0.54688]
  source "github.com/Zehong-Ma/ComfyUI-MagCache (40 steps)"
preset hunyuan_video_1_5_40 for class "^HunyuanVideo15Transformer3DModel$" when false
  with threshold = 0.03, skips = 2, retention = 0.25,
  ratios = [1.0, 1.04199, 1.01172, 1.00293, 1.00098, 1.0, 0.99805, 0.99854, 0.99658, 0.99707,
    0.99609, 0.99658, 0.99658, 0.99658, 0.99561, 0.99561, 0.99658, 0.99609, 0.99512, 0.99463,
    0.99463, 0.99463, 0.99365, 0.99365, 0.99219, 0.99219, 0.99072, 0.99072, 0.98926, 0.9873,
    0.98535, 0.9834, 0.97998, 0.97607, 0.96973, 0.96338, 0.9502, 0.93066, 0.896, 0.81787]
  source "github.com/Zehong-Ma/ComfyUI-MagCache (40 steps)"

match blocks
  when step >= floor(retention * steps + 0.5) while sum(abs(1 - product(ratios[step]))) <= threshold
  at most skips in a row -> reuse residual

expect blocks over 10 steps: C C R R R C R R R C
