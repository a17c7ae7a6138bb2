cachepolicy 1
policy tuned

table scales = [3.43, 0.79, 0.7, 0.87, 1.05, 1.33, 2.31]

match model
  on {0, 3, 5, 7, 9, 12, 16, 21, 27, 33, 39, 44, 47, 49}
  -> predict taylor(order: 1, scale: scales[step])

expect model over 50 steps:
  C R R C R C R C R C R R C R R R C R R R R C R R R R R C R R R R R C R R R R R C R R R R C R R C R
    C

tuned over 50 steps with denoiser = "FluxTransformer2DModel", config = "442a0ae0300f",
  adapters = [], scheduler = "FlowMatchEulerDiscreteScheduler",
  sigmas = [1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.88, 0.86, 0.84, 0.82, 0.8, 0.78, 0.76, 0.74, 0.72,
    0.7, 0.68, 0.66, 0.64, 0.62, 0.6, 0.58, 0.56, 0.54, 0.52, 0.5, 0.48, 0.46, 0.44, 0.42, 0.4,
    0.38, 0.36, 0.34, 0.32, 0.3, 0.28, 0.26, 0.24, 0.22, 0.2, 0.18, 0.16, 0.14, 0.12, 0.1, 0.08,
    0.06, 0.04, 0.02],
  guidance = 3.5, latents = [64, 48], target = "cost 0.28", cost = 0.28, samples = 6, held_out = 2,
  forecast = 49.962, psnr = 56.293, psnr_p10 = 52.909, version = "0.1.0"
