cachepolicy 1
policy l2c "Learning-to-Cache"
source "arXiv:2406.01733"

# A trained router has a score for each module and step; a module with a score up to a threshold is reused. Every second
# step computes as a whole, counted from the end; HarmoniCa (arXiv:2410.01723) asks its routers at every step.
#
# A mask has a 1 for each step at which a module computes. The masks are in the order in which `plan` prints the modules.

param attention_masks: list? = off "a mask for each attention module"
param feedforward_masks: list? = off "a mask for each feed-forward module"
param alternate: bool = true "whether every second step computes"

match attention or feedforward when alternate and (steps - step) % 2 == 0 -> compute
match attention mask attention_masks by site -> reuse
match feedforward mask feedforward_masks by site -> reuse

expect feedforward over 6 steps
  with feedforward_masks = ["000100", "000100", "000100", "000100", "000100", "000100", "000100",
    "000100", "000100", "000100", "000100", "000100"]:
  C R C C C R
expect attention over 5 steps with alternate = false,
  attention_masks = ["10010", "10010", "10010", "10010", "10010", "10010", "10010", "10010",
    "10010", "10010", "10010", "10010", "10010", "10010", "10010", "10010", "10010", "10010",
    "10010", "10010", "10010", "10010", "10010", "10010"]:
  C R R C R
