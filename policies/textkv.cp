cachepolicy 1
policy textkv "Text key and value cache"
source "github.com/huggingface/diffusers"

# The keys and values of a prompt are the same at every step where they are projected from the prompt alone: they are
# computed once for each branch. A module runs again where its input is not exactly what it was when it last ran, so that
# nothing changes. The comparison waits for the device; with `trusted = true` nothing is compared.
#
# diffusers has this for one model, and tells prompts apart by the addresses of their tensors. It also keeps the rotation
# of the keys, which is no module.

param names: list =
    ["^transformer_blocks\.\d+\.(encoder_proj|attn\.(add_k_proj|add_v_proj|norm_added_k))$"]
  "regexes of modules that read the prompt alone, besides the projections in cross-attention"
param trusted: bool = false
  "whether the prompt of a branch is the same at all steps of a trajectory"

signal text = input(self)
signal changed = differing(text, kept(text))

match "\.to_[kv]$" within cross_attention or names when trusted -> reuse
match "\.to_[kv]$" within cross_attention or names while changed == 0 -> reuse

expect "\.to_[kv]$" within cross_attention over 6 steps with changed = [1, 0, 0, 0.1, 0, 1]:
  C R R C R C
expect "\.to_[kv]$" within cross_attention over 4 steps with changed = 1, trusted = true: C R R R
