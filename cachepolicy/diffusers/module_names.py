"""Names of modules and classes in denoisers: how attention, feed-forward and lists of blocks are recognised.

The names are those of `diffusers.models`. Models outside diffusers mostly use the same words. Where a live model is
given, its structure decides first (see `cachepolicy.engine.introspection`).
"""

from __future__ import annotations

import re

ATTENTION_CLASSES = frozenset(
    {
        "diffusers.models.attention.AttentionModuleMixin",
        "diffusers.models.attention_processor.Attention",
        "diffusers.models.attention_processor.MochiAttention",
    }
)
"""The classes by which diffusers' own caches find attention (`diffusers.hooks._common._ATTENTION_CLASSES`)."""

FEEDFORWARD_CLASSES = frozenset(
    {"diffusers.models.attention.FeedForward", "diffusers.models.attention.LuminaFeedForward"}
)
"""The classes by which they find feed-forward (`diffusers.hooks._common._FEEDFORWARD_CLASSES`)."""

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
"""In the name of an attention module or of its class."""

CROSS_ATTENTION = re.compile(r"cross|(^|_)attn2$|_to_.*_attn|encoder_attn")
"""In the name of an attention module whose keys come from another sequence than its queries.

`attn2` is the text attention of `BasicTransformerBlock`, `audio_to_video_attn` is LTX2's.
"""

CONTEXT_ARGUMENTS = re.compile(r"^(context|encoder_hidden_states|memory|key_value_states)$")
"""A parameter of an attention's forward for the sequence that its keys come from."""

SELF_ATTENTION = "self"
"""In the name of an attention module whose keys come from its own sequence, whatever else the name says."""

FEEDFORWARD_CLASS = re.compile(r"feedforward|mlp$|ffn", re.IGNORECASE)
"""In the name of the class of a feed-forward module."""

FEEDFORWARD = re.compile(r"(^|_)(ff|ffn|mlp|feed_?forward)(_context|_[ab])?\d*$")
"""The name of a feed-forward module: `ff`, `ff_context` (SD3), `img_mlp` (Qwen-Image), `feed_forward` (Lumina 2).

`ff_a` and `ff_b` are the two streams of DiffSynth's FLUX.
"""

EMBEDDER = re.compile(r"embed")
"""In the name of a module that embeds the timestep, a text or a picture. A network inside it is no feed-forward."""

SIDE_LIST = re.compile(r"refiner|vace|text|context|caption|clip|face|audio_proj|controlnet|connector|perceiver")
"""Lists of blocks beside the main stream: they refine the text or an image prompt, or feed a control image.

`context_refiner` and `noise_refiner` (Lumina 2, Z-Image), `vace_blocks` (Wan VACE), `text_transformer_blocks`
(Kandinsky 5), `caption_projection` (HiDream), `face_adapter` (Wan Animate), `perceiver_cross_attention` (ConsisID).
"""

BLOCK = re.compile(r"block", re.IGNORECASE)
"""In the name of a class that holds more than one attention."""

JOINT_ATTENTION = re.compile(r"add_q|added_q|to_add_out")
"""Children of an attention module that project a second stream to queries and to outputs of its own.

`add_q_proj`, `norm_added_q` and `to_add_out` of diffusers' `Attention`. `add_k_proj` and `add_v_proj` add keys only.
"""

QUERY_WORDS = frozenset({"q", "qkv", "query", "queries", "wq", "wqkv"})
OUTPUT_WORDS = frozenset({"out", "o", "wo"})
"""Words in the names of projections of attention modules: `img_qkv` and `txt_qkv`, `out_img` and `out_txt`."""

KEY_WORDS = frozenset({"k", "kv", "key", "keys", "wk", "wkv"})
FUSED_WORDS = frozenset({"qkv", "wqkv"})
"""With `QUERY_WORDS`, words in the names of projections that only attention modules have."""

QUERIES = ("to_q", "to_query", "wq", "q", "q_proj", "query")
KEYS = ("to_k", "to_key", "wk", "k", "k_proj", "key")
"""The projections of an attention module. Different input widths show cross-attention."""
