"""What the cookbook says about single policies: how the method works, and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Text:
    """The words of a page.

    Attributes:
        works: How the method works.
        limits: Its limits, as a list in Markdown.
        values: Params of the policy for the grid on the emoji model.
        signals: The series of each signal for the grid, which is repeated.
    """

    works: str
    limits: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    signals: dict[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])


TEXTS = {
    "fbc": Text(
        works="""\
The first block runs at every step. What it adds to the hidden states is compared with what it added at
the last step at which all blocks ran. While the relative change is at most the threshold, the other
blocks are left out, and what they added then is added again. The decision costs one block and one
number a step, and no calibration.""",
        limits="""\
- The threshold belongs to a model and a number of steps: more steps make the changes between them
  smaller.
- Without `streak` or `window`, a threshold that is too large can reuse for many steps in a row.
- On models for editing the tokens of reference pictures are counted, too
  ([W517](../diagnostics/W517.md)); `fbc_edit` leaves them out.
- ParaAttention and WaveSpeed reuse below the threshold, this file and diffusers at the threshold too.""",
        signals={"drift": (0.02, 0.04, 0.08)},
    ),
    "teacache": Text(
        works="""\
The input of the first block after its modulation by the timestep tells how much the output of the model
will change. Each step measures the relative change of this input since the step before. A polynomial of
degree 4, fitted once for a model, turns it into an estimate of the output's change, and the estimates
are added up since the last computed step. While the sum is below the threshold, all blocks are left out
and what they added last is added again. The first and the last step compute.""",
        limits="""\
- The polynomial belongs to a model. Without a preset that fits, it is FLUX.1's; `cachepolicy calibrate`
  fits one.
- The polynomial is neither clamped nor made positive, so that a sum can fall: Wan's has the value -13
  at 0. Ports make each term positive; `cachepolicy convert` keeps the form of the port.
- On Wan, CogVideoX and ConsisID the probe is an embedding of the timestep, so that the steps depend on
  the scheduler alone. For blocks that modulate by themselves there is `teacache_inline`, for the
  timestep itself `teacache_timestep`.
- The authors compute five steps at the beginning with the retention polynomials (`_ret`); `use teacache
  when step >= 5` adds that.""",
        signals={"change": (0.09, 0.06, 0.04)},
    ),
    "magcache": Text(
        works="""\
The magnitude of what the blocks add shrinks from step to step by a ratio that hardly depends on the
prompt. A table has the ratios of a model, measured once. The product of the ratios since the last
computed step tells how far a reused residual is off, and its distance from 1 is added up over the
reuses. While the sum is at most the threshold, and not more than `skips` steps in a row, all blocks are
left out. Nothing is measured in the run, so that `plan` knows the steps.""",
        limits="""\
- Without a preset or ratios of its own, the table is `[1]`, which reuses `skips` steps after each
  computed one. `cachepolicy calibrate` measures the ratios of a model.
- A table of another number of steps is read at the nearest step.
- With guidance, the authors have a table for each half. Presets have that of the conditional half, for
  both.
- The authors' code leaves out one step of FLUX.1's table, and compares with `<` for Wan.""",
        values={"ratios": [1.0, 1.06, 1.03, 1.02, 1.01, 1.0, 0.99, 0.98, 0.96, 0.92], "threshold": 0.12},
    ),
    "taylorseer": Text(
        works="""\
The outputs of attention and feed-forward modules are smooth functions of the step. At computed steps
the differences of the outputs are kept, up to the order. At the steps between, each module is answered
with the Taylor expansion of these differences; the norms, gates and residual additions of the blocks
run at every step. The first steps compute, so that there are differences.""",
        limits="""\
- Memory: order + 1 outputs of every module are kept, for each branch of guidance. `taylorseer_lite`
  forecasts the last hidden state alone.
- The differences are recursive, as in the authors' code; order 2 is not exact on a parabola.
- `interval` counts from the last computed step. `diffusers = true` is the schedule of diffusers, which
  forecasts one step earlier.
- What is saved is the modules. The rest of each block runs at every step.""",
    ),
    "dbcache": Text(
        works="""\
The first `first` blocks run at every step. What they add is compared with what they added at the last
step at which the middle blocks ran. While the relative change is below the threshold, the middle blocks
are left out, and their residual is reused or, with `order`, forecast. The blocks from `end` on run on
the result. A warm-up, a mask of steps, and bounds of reuses in a row and in all narrow it. With one
block at the beginning and none at the end it is First Block Cache.""",
        limits="""\
- cache-dit decides for each list of blocks by itself; here all lists of a model are one chain.
- cache-dit's speed-ups in its tables are ratios of FLOPs, not of time.
- Its other calibrators (FoCa, DMD), a coarser probe and important tokens are not expressed.
- [Coming from cache-dit](../coming-from-cache-dit.md) has its fields one by one.""",
        values={"first": 2, "warmup": 6, "streak": 3},
        signals={"drift": (0.03, 0.05, 0.07, 0.12)},
    ),
    "easycache": Text(
        works="""\
Between two computed steps the model turns a change of its input into a change of its output at a nearly
constant rate. Each step measures the change of the latents since the step before, times this rate,
relative to the size of the last output, and adds it up. While the sum is below the threshold, the whole
model is left out: the answer is the latents plus what the model last added to them. With guidance in
two calls the conditional one decides.""",
        limits="""\
- The whole model is skipped, also its embeddings and its head; no part of it adapts to the step.
- Input and output need one shape. Models that predict a variance beside the noise have another output.
- ComfyUI and stable-diffusion.cpp measure from the last computed step and add up, so that their
  thresholds are other numbers; `cachepolicy convert` keeps their form.""",
        signals={"change": (0.012, 0.018, 0.024)},
    ),
    "seacache": Text(
        works="""\
TeaCache without a fitted polynomial. The probe goes through a filter that follows the noise level: it
keeps the frequencies that carry the picture at this level and damps those that are noise. The relative
changes of the filtered probe since the step before are added up since the last computed step, and all
blocks are left out while the sum is below the threshold.""",
        limits="""\
- The filter needs the noise level and the grid of the tokens. Where a run does not tell them, every
  step computes.
- `beta` is 2 for pictures and 3 for videos.
- The authors keep the unfiltered probe at forced steps; here it is filtered at all steps.
- diffusers filters the latents instead, and forecasts the residual; `cachepolicy convert` of its config
  is that form.""",
        signals={"change": (0.1, 0.14, 0.08)},
    ),
    "adaptive_guidance": Text(
        works="""\
Classifier-free guidance computes two predictions a step. They come to point in nearly the same
direction. While their cosine is below `gamma`, both are computed; from the next step on, for good, the
conditional one alone is computed and stands for both, so that guidance adds nothing. Two other forms are
params of it: an interval of steps with guidance (`first`, `last`), and a gate at a share of the steps
(`start`, `stop`). `gamma = 2` leaves the cosine out.""",
        limits="""\
- A guidance-distilled model has one prediction a step, and nothing to save.
- Where guidance runs in two calls, the conditional one has to come first; otherwise both compute.
- The pipeline still applies its guidance scale, to two equal predictions. Guidance with a rescale or a
  projection of its own can differ from a run without guidance.
- LinearAG, which estimates the unconditional prediction, is `approximate uncond affine` with factors of
  a model; none are published.""",
        signals={"alike": (0.9,) * 19 + (0.995,) * 31},
    ),
}
"""The pages with words of their own."""
