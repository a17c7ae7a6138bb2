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

# The authors' polynomials, where a module of diffusers gives the authors' probe; `teacache_inline` and `teacache_timestep`
# have those of other models. Thresholds are the authors' first choices. Configurations do not tell Kontext from FLUX.1
# or Wan's I2V models for 480 and 720 lines apart: these presets are chosen by name alone. The experts of Wan 2.2's 14B
# have the configuration of Wan 2.1's, and get its polynomial. The retention variants (`_ret`) read the projected
# timestep; the authors compute the first five steps then, which `use teacache ... when step >= 5` adds.

preset flux for class "^FluxTransformer2DModel$"
  with coefficients = [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861],
  threshold = 0.25
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4FLUX (its authors: 1.5 times as fast)"
preset hunyuan_video for class "^HunyuanVideoTransformer3DModel$"
  with coefficients = [733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896],
  threshold = 0.1
  source
    "github.com/ali-vilab/TeaCache/tree/main/TeaCache4HunyuanVideo (its authors: 1.6 times as fast)"
preset mochi for class "^MochiTransformer3DModel$"
  with coefficients = [-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719],
  threshold = 0.06
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Mochi (its authors: 1.5 times as fast)"
preset cosmos for class "^CosmosTransformer3DModel$"
  with coefficients = [271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633], threshold = 0.3
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Cosmos (its authors: 1.4 times as fast)"
preset lumina2 for class "^Lumina2Transformer2DModel$"
  with coefficients = [393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344],
  probe = ["^layers\.0\.norm1$"], threshold = 0.3
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Lumina2 (its authors: 1.6 times as fast)"
preset consisid for class "^ConsisIDTransformer3DModel$"
  with coefficients = [-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339],
  probe = ["^time_embedding$"], threshold = 0.1
  source
    "github.com/ali-vilab/TeaCache/tree/main/TeaCache4ConsisID (its authors: 1.6 times as fast)"
preset cogvideox_2b for class "^CogVideoXTransformer3DModel$" when num_layers == 30
  with coefficients = [-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568],
  probe = ["^time_embedding$"], threshold = 0.1
  source "github.com/ali-vilab/TeaCache/tree/main/eval/teacache"
preset cogvideox_5b for class "^CogVideoXTransformer3DModel$"
  when num_layers == 42 and sample_height == 60
  with coefficients = [-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339],
  probe = ["^time_embedding$"], threshold = 0.1
  source "github.com/ali-vilab/TeaCache/tree/main/eval/teacache"
preset cogvideox_1_5_5b for class "^CogVideoXTransformer3DModel$"
  when num_layers == 42 and sample_height != 60 and patch_size_t == 2
  with coefficients = [250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703],
  probe = ["^time_embedding$"], threshold = 0.1
  source
    "github.com/ali-vilab/TeaCache/tree/main/TeaCache4CogVideoX1.5 (its authors: 1.4 times as fast)"
preset wan_t2v_1_3b for class "^WanTransformer3DModel$" when num_layers == 30 and in_channels == 16
  with coefficients = [2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774],
  threshold = 0.08, probe = ["^condition_embedder\.time_embedder$"]
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1 (its authors: 2 times as fast)"
preset wan_t2v_14b for class "^WanTransformer3DModel$" when num_layers == 40 and in_channels == 16
  with coefficients = [-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404],
  threshold = 0.14, probe = ["^condition_embedder\.time_embedder$"]
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1 (its authors: 1.4 times as fast)"
preset wan_i2v_480 for class "^WanTransformer3DModel$" when false
  with coefficients = [-302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289],
  probe = ["^condition_embedder\.time_embedder$"], threshold = 0.13
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1 (its authors: 1.6 times as fast)"
preset wan_i2v_720 for class "^WanTransformer3DModel$" when false
  with coefficients = [-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683],
  probe = ["^condition_embedder\.time_embedder$"], threshold = 0.18
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1 (its authors: 1.7 times as fast)"
preset wan_t2v_1_3b_ret for class "^WanTransformer3DModel$" when false
  with coefficients = [-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664],
  threshold = 0.05, probe = ["^condition_embedder\.time_proj$"]
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1 (its authors: 1.6 times as fast)"
preset wan_t2v_14b_ret for class "^WanTransformer3DModel$" when false
  with coefficients = [-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525],
  threshold = 0.1, probe = ["^condition_embedder\.time_proj$"]
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1 (its authors: 2 times as fast)"
preset wan_i2v_480_ret for class "^WanTransformer3DModel$" when false
  with coefficients = [257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977],
  threshold = 0.2, probe = ["^condition_embedder\.time_proj$"]
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1 (its authors: 1.8 times as fast)"
preset wan_i2v_720_ret for class "^WanTransformer3DModel$" when false
  with coefficients = [8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401],
  threshold = 0.3, probe = ["^condition_embedder\.time_proj$"]
  source "github.com/ali-vilab/TeaCache/tree/main/TeaCache4Wan2.1"
preset flux_kontext for class "^FluxTransformer2DModel$" when false
  with coefficients = [-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863],
  threshold = 0.22
  source
    "github.com/welltop-cn/ComfyUI-TeaCache (its authors: 2 times as fast, between 0.2 and 0.9 of the steps)"
preset hidream_dev for class "^HiDreamImageTransformer2DModel$" when false
  with coefficients = [1.39997273, -4.30130469, 5.01534416, -2.20504164, 0.93942874], threshold = 1,
  probe = ["^x_embedder$"]
  source "github.com/welltop-cn/ComfyUI-TeaCache (its authors: 2 times as fast)"
preset hidream_fast for class "^HiDreamImageTransformer2DModel$" when false
  with coefficients = [2.26509623, -6.88864563, 7.61123826, -3.10849353, 0.99927602],
  threshold = 1.5, probe = ["^x_embedder$"]
  source
    "github.com/welltop-cn/ComfyUI-TeaCache (its authors: 1.7 times as fast, up to 0.9 of the steps)"
preset lumina2_timestep for class "^Lumina2Transformer2DModel$" when false
  with coefficients = [-874.643948, 466.059906, -75.1559762, 5.32836175, -0.0327258296],
  threshold = 0.38, probe = ["^time_caption_embed\.timestep_embedder$"]
  source
    "github.com/welltop-cn/ComfyUI-TeaCache (its authors: 1.7 times as fast, from 0.2 of the steps)"

signal modulated = output(probe)
signal change = poly(coefficients, relative_l1(modulated, prev(modulated)))

match blocks when 0 < step < steps - 1 while sum(change) < threshold -> reuse residual

expect blocks over 10 steps with change = 0.1: C R R C R R C R R C
