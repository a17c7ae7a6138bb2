"""Names of the arguments of denoisers: which are timesteps, positions, or created anew at each step.

The names are those of the `forward` methods in `diffusers.models.transformers` and `diffusers.models.unets`. The same
names are used by most models outside diffusers.
"""

from __future__ import annotations

import re

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "vision_timesteps", "timestep_ratio")
"""Names of the timestep argument, the most frequent first.

`timesteps` is HiDream's, `t` is Z-Image's and Kandinsky's, `vision_timesteps` is Cosmos 3's, `timestep_ratio` is Stable
Cascade's.
"""

HIDDEN_STATES = "hidden_states"
"""The name of a block's input stream, and of the latents of most transformers."""

STREAMS = (HIDDEN_STATES, "gen_seq")
"""Names of the input of a block that carries what is generated, the most frequent first.

`gen_seq` is Cosmos 3's, whose blocks take the stream of the prompt first. It does not change from step to step.
"""

POSITIONS_OR_MASKS = re.compile(r"(^|_)(ids|indices|indexes|masks?)$")
"""Arguments that are no latents even if they come first: `img_ids`, `token_indices`, `attention_mask`."""

POSITIONS = re.compile(r"(^|_)(indices|index|ids|positions?)(_|$)")
"""Arguments that may be a list of positions, whose length is not a batch size: `img_ids`, `position_ids`."""

NEW_AT_EACH_STEP = re.compile(
    r"^(audio|video)_hidden_states$|residuals?$|block_samples$|^sigmas?$|timestep|^step(_index)?$"
)
"""Arguments that pipelines create anew at each step, so that they do not identify a guidance branch.

They are the latents of a second stream (LTX2), the residuals of ControlNets (`down_block_additional_residuals`,
`controlnet_block_samples`), and the position in the trajectory.
"""

GRID_SIZES = ("num_frames", "height", "width")
"""The latent grid of a token sequence as three whole numbers: LTX Video and Sana-Video."""

GRID_IDS = "img_ids"
"""The latent grid as positions `(S, 3)` of frame, row and column: Flux and its relatives."""

GRID_SHAPES = "img_shapes"
"""The latent grid as nested lists of `(frames, height, width)`: Qwen-Image."""
