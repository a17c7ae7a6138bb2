cachepolicy 1
policy deepcache "DeepCache"
source "arXiv:2312.00858"

# The deep part of a U-Net gives features that change little from step to step: what it gave at the last full step enters
# the shallow part, which computes at every step.
#
# `deep` names what is reused. The default is the cut of the authors' branch 0 in Stable Diffusion 1 and 2: all but the first
# convolution and the last layer of the last block. All that crosses the cut is kept, each module with its own output.

param interval: int = 3 in [1, inf) "compute every so many steps"
param steps_on: list? = off "the steps that compute, in place of an interval"
param deep: list = ["^down_blocks\.\d+$", "^mid_block$", "^up_blocks\.[012]$",
    "^up_blocks\.3\.(resnets|attentions)\.[01]$"]
  "regexes of the modules below the cut"

preset stable_diffusion for class "^UNet2DConditionModel$" when cross_attention_dim in {768, 1024}
  with interval = 3 source "github.com/horseee/DeepCache (its authors: 2.3 times as fast)"
preset sdxl for class "^UNet2DConditionModel$" when cross_attention_dim == 2048 with interval = 3,
  deep = ["^down_blocks\.\d+$", "^mid_block$", "^up_blocks\.[01]$",
    "^up_blocks\.2\.(resnets|attentions)\.[01]$"]
  source "github.com/horseee/DeepCache"

match deep on steps_on -> reuse
match deep every interval -> reuse

expect attention over 7 steps with deep = ["attn"]: C R R C R R C
expect attention over 7 steps with deep = ["attn"], steps_on = [0, 2, 5]: C R C R R C R
