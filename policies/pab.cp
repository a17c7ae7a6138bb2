cachepolicy 1
policy pyramid_attention_broadcast "Pyramid Attention Broadcast"
source "arXiv:2408.12588"

# In the middle of the sampling an attention module's output changes little from step to step, the less so
# the further it looks: least between a prompt and a picture (cross), more over time, most over space. So each
# kind is computed once and broadcast to the following steps over a range of its own.

param spatial_every: int? = 2 in [1, inf) "spatial attention: compute every so many steps"
param temporal_every: int? = off in [1, inf) "temporal attention: compute every so many steps"
param cross_every: int? = off in [1, inf) "cross-attention: compute every so many steps"

param spatial_range: range = (100, 800) "timesteps between which spatial attention is broadcast"
param temporal_range: range = (100, 800) "timesteps between which temporal attention is broadcast"
param cross_range: range = (100, 800) "timesteps between which cross-attention is broadcast"

param spatial_names: list = ["blocks", "transformer_blocks", "single_transformer_blocks", "layers",
    "visual_transformer_blocks"]
  "regexes of the modules with spatial attention"
param temporal_names: list = ["temporal_transformer_blocks"]
  "regexes of the modules with temporal attention"
param cross_names: list = ["blocks", "transformer_blocks", "layers"]
  "regexes of the modules with cross-attention"

# First, since the spatial names match inside `temporal_transformer_blocks` too.
match optional self_attention and temporal_names
  when t in temporal_range every temporal_every -> reuse

match optional self_attention and spatial_names and not temporal_names
  when t in spatial_range every spatial_every -> reuse

match optional cross_attention and cross_names when t in cross_range every cross_every -> reuse

# Timesteps 999, 888, ..., 0: the first two and the last are outside the range.
expect self_attention and "^transformer_blocks" over 10 steps: C C C R C R C R C C
expect self_attention and "^temporal" over 10 steps with temporal_every = 3: C C R C R R C R R C
expect cross_attention over 10 steps with cross_every = 5: C C R R R C R R R C
