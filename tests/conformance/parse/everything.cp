# Every form of every statement.
cachepolicy 1
policy everything "each form once"
source 'a "paper"'

param whole: int = 3 in [1, 50] "compute every so many steps"
param sometimes: int? = off in {1, 2, 3}
param amount: float = -2.5e-3 in (-inf, 1]
param flag: bool = true
param word: string = "attn" in {"attn", "ff"} "it's ""quoted"""
param window: range = [100, 800]
param half_open: range = [100, 800)
param many: list = ["^blocks", 'layers"']
param steps_list: list = [0, 5]
param pattern: string = "1101"

let late = progress > 0.5 or not (step < 3 and steps >= 10)
let scaled = -(5) + (whole - (amount - 3)) * 2 / -4 % 7
let picked = 1 if flag else 2 if late else clamp(t, 0, inf)
table ratios = [1.0, 0.98, -1, 2e-3]
external strength: float

signal one = input(model)
signal two = output("^blocks\.0\.norm1$")
signal three = residual(blocks[0:8])
signal four = argument(model, "temb")
signal drift = relative_l1(three, kept(three))
signal change = poly([1, -2, 0.5], l1(two, prev(two)) + l2(one) - cosine(kept(four), kept(four, 2)))

match "x" -> compute
match optional word when t in window every whole -> skip
match many and not class "^Linear$" when t in half_open every whole + 1 offset 2 -> reuse
match (attention or block) and not self_attention every 5 from end -> reuse
match cross_attention every sometimes since compute at most sometimes in a row -> reuse residual
match feedforward on {0, 1, 2, 7} -> predict taylor(order: 1)
match feedforward on steps_list -> predict hermite(order: 2, scale: 0.5) of residual
match each blocks[1:-1] mask "1101" -> predict linear(weight: strength * 0.5, feedback: true)
match each blocks[3] and "blocks" mask pattern -> reuse
match blocks[whole:] of "^layers$" while drift < 3 at most 3 in a row at most 9 in all
  -> reuse residual follow cond
match blocks when branch == "cond" and step in {0, 5} while sum(abs(1 - product(ratios[step]))) <= amount and age - kept(age) < 3
  and sum(change) < max(amount, picked, 1) -> reuse residual
match block when uncond_skipped == false and late and scaled != 3 -> compute
match model every 5 -> approximate uncond spectral(low: 1.1, high: 1, layout: "uncond first")

use other_policy
use "folder/other.cp" with spatial_every = whole, window = (100, 850), names = ["a", "b"], off_too = off

expect attention over 4 steps: C R C R
expect each blocks over 3 steps with t = [900, 600, 0], drift = 0.5, amount = -1: CCR
