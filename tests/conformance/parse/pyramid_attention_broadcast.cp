policy pyramid_attention_broadcast
param spatial_every:  int? = 2
param temporal_every: int? = off
param cross_every:    int? = off
param spatial_range:  range = (100, 800)
param temporal_range:  range = (100, 800)
param cross_range:  range = (100, 800)
param spatial_names:  list = ["blocks", "layers"]
param temporal_names:  list = ["blocks", "layers"]
param cross_names:  list = ["blocks", "layers"]
match optional self_attention and temporal_names when t in temporal_range every temporal_every -> reuse
match optional self_attention and spatial_names and not temporal_names
  when t in spatial_range every spatial_every -> reuse
match optional cross_attention and cross_names when t in cross_range every cross_every -> reuse
