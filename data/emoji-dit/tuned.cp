cachepolicy 1
policy tuned

table scales = [0.58, 1.31, 0.9, 0.96, 1.12, 1.17, 2.12]

match model
  on {0, 2, 5, 8, 11, 15, 19, 24, 29, 34, 39, 43, 46, 48}
  -> predict taylor(order: 1, scale: scales[step])

expect model over 50 steps:
  C R C R R C R R C R R C R R R C R R R C R R R R C R R R R C R R R R C R R R R C R R R C R R C R C
    R

tuned over 50 steps with denoiser = "DiTTransformer2DModel", config = "15086db422d0", adapters = [],
  scheduler = "FlowMatchEulerDiscreteScheduler",
  sigmas = [1.0, 0.97961, 0.95922, 0.93884, 0.91845, 0.89806, 0.87767, 0.85729, 0.8369, 0.81651,
    0.79612, 0.77573, 0.75535, 0.73496, 0.71457, 0.69418, 0.6738, 0.65341, 0.63302, 0.61263,
    0.59224, 0.57186, 0.55147, 0.53108, 0.51069, 0.49031, 0.46992, 0.44953, 0.42914, 0.40876,
    0.38837, 0.36798, 0.34759, 0.3272, 0.30682, 0.28643, 0.26604, 0.24565, 0.22527, 0.20488,
    0.18449, 0.1641, 0.14371, 0.12333, 0.10294, 0.082551, 0.062163, 0.041776, 0.021388, 0.001],
  guidance = 2.0, latents = [3, 32, 32], target = "cost 0.28", cost = 0.28, samples = 6,
  held_out = 2, forecast = 49.144, psnr = 49.963, psnr_p10 = 43.302, version = "0.1.0"
