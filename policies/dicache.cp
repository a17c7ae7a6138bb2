cachepolicy 1
policy dicache "DiCache"
source "arXiv:2508.17356"

# The first blocks always run, as a probe: how much their output changes from step to step is added up, and while the sum is
# small the residual of the other blocks is answered. It moves on from that of the last computed step as far as the probe's
# residual has moved along its own last change.
#
# The authors keep residuals of the probe and the other blocks together, so that their answers begin at the probe's input;
# here they begin at its output, which is that of this step. Their code for FLUX restores the stream of the picture
# alone, and that for HunyuanVideo compares with `<=`.

param threshold: float = 0.4 in [0, inf) "smallest sum of changes that computes"
param retention: float = 0.2 in [0, 1] "share of the steps that compute at the beginning"
param late: int = 1 in [0, inf) "further steps that compute at the beginning"
param last: int = 1 in [0, inf) "steps that compute at the end"
param depth: int = 1 in [1, inf) "blocks of the probe; the authors recommend 1 to 5"
param most: float = 1.5 in [1, inf) "most that an answer moves on, in last changes"
param minus: bool = false "whether changes of the probe's input are taken off"

preset flux for class "^FluxTransformer2DModel$" with threshold = 0.4
  source "github.com/Bujiazi/DiCache"
preset flux_minus for class "^FluxTransformer2DModel$" when false with threshold = 0.08,
  retention = 0, minus = true source "github.com/Bujiazi/DiCache"
preset hunyuan_video for class "^HunyuanVideoTransformer3DModel$" with threshold = 0.1, late = 0,
  last = 0 source "github.com/Bujiazi/DiCache"
preset wan for class "^WanTransformer3DModel$" with threshold = 0.08, late = 0, last = 0, most = 2
  source "github.com/Bujiazi/DiCache"

signal x = input(blocks[0:depth])
signal y = output(blocks[0:depth])
signal probe = residual(blocks[0:depth])
signal moved = relative_l1(x, prev(x))
signal change = relative_l1(y, prev(y))

match blocks[depth:]
  when floor(retention * steps) + late <= step < steps - last
  while sum(abs(change - moved) if minus else change) < threshold
  -> predict align(probe: probe, clip: [1, most]) of residual

expect blocks[1:] over 12 steps with change = 0.15, moved = 0: C C C R R C R R C R R C
expect blocks[1:] over 8 steps with change = 0.15, moved = 0.1, minus = true, late = 0, last = 0,
  threshold = 0.12: C R R C R R C R
