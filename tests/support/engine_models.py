"""Tiny models of five families as four programs build them, and their recorded module trees.

`python -m tests.support.engine_models` records the trees of the engines that can be imported, into
`tests/data/engine_trees.json`. A model has two to three blocks in each list.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

RECORDED = Path(__file__).parents[1] / "data" / "engine_trees.json"

POLICY = "cachepolicy 1\nparam n: int = 2 in [1, inf)\nmatch blocks[1:] when 100 < t < 950 every n -> reuse residual\n"
"""The policy of a server in the tests of the plugins."""

FBC = {"policy": "fbc", "params": {"threshold": 50.0}}
"""The setting of another one that requests may name: it reuses from the second step on."""

FAMILIES = ("flux", "wan", "qwen_image", "sd3", "z_image")
ENGINES = ("vllm_omni", "sglang", "diffsynth")


@functools.cache
def _omni_world(config: tuple[tuple[str, Any], ...]) -> Any:
    """Enter the contexts of vLLM-Omni for the rest of the process, and return its config."""
    from vllm.config import set_current_vllm_config
    from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig, TransformerConfig
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.forward_context import set_forward_context
    from vllm_omni.diffusion.vllm_config import create_diffusion_vllm_config

    omni = OmniDiffusionConfig(
        model=None,
        dtype=torch.float32,
        num_gpus=1,
        tf_model_config=TransformerConfig.from_dict(dict(config)),
        parallel_config=DiffusionParallelConfig(),
    )
    vllm = create_diffusion_vllm_config(torch.device("cpu"), omni)
    # the contexts are never left
    for context in (set_current_vllm_config(vllm), set_forward_context(vllm_config=vllm, omni_diffusion_config=omni)):
        _ENTERED.append(context)
        context.__enter__()
    if parallel_state._SP is None:  # another engine may have set up torch.distributed
        _name_processes("29571")
        parallel_state.init_distributed_environment(world_size=1, rank=0)
        parallel_state.initialize_model_parallel()
    return omni


_ENTERED: list[Any] = []


def _name_processes(port: str) -> None:
    """Tell torch.distributed of one process."""
    one = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in one.items():
        os.environ.setdefault(name, value)


SD3 = {
    "num_layers": 3,
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "joint_attention_dim": 16,
    "patch_size": 2,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}


def _omni(path: str, name: str, config: dict[str, Any] | None = None, **sizes: Any) -> Callable[[], Any]:
    """Return what builds a model of vLLM-Omni. One that takes the config of the engine gets sizes from `config`."""

    def build() -> Any:
        world = _omni_world(tuple((config or {}).items()))
        given = {} if config is None else {"od_config": world}
        kind = getattr(importlib.import_module(f"vllm_omni.diffusion.models.{path}"), name)
        return kind(**given, **sizes)

    return build


class _Arguments(SimpleNamespace):
    """Server arguments of SGLang of which nothing was said."""

    def is_arg_explicitly_set(self, name: str) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return None


@functools.cache
def _sglang_world() -> None:
    """Set up what the models of SGLang ask for, for one process."""
    _name_processes("29573")
    from sglang.multimodal_gen.runtime.distributed import parallel_state
    from sglang.multimodal_gen.runtime.server_args.server_args import set_global_server_args

    parallel_state.maybe_init_distributed_environment_and_model_parallel(1, 1)
    told = {"attention_backend": None, "enable_attention_backend_autotune": False, "kv_gather_degree": 1}
    set_global_server_args(_Arguments(**told))


def _sglang(module: str, name: str, config: str, **sizes: Any) -> Callable[[], Any]:
    def build() -> Any:
        _sglang_world()
        configs, _, kind = config.rpartition(".")
        made = getattr(importlib.import_module(f"sglang.multimodal_gen.configs.models.dits.{configs}"), kind)()
        for key, value in sizes.items():
            setattr(made.arch_config, key, value)
        models = importlib.import_module(f"sglang.multimodal_gen.runtime.models.dits.{module}")
        return getattr(models, name)(made, {})

    return build


def _diffsynth(module: str, name: str, **sizes: Any) -> Callable[[], Any]:
    def build() -> Any:
        with torch.device("meta"):
            made = getattr(importlib.import_module(f"diffsynth.models.{module}"), name)(**sizes)
        if hasattr(made, "single_blocks"):  # their number is no argument
            made.single_blocks = made.single_blocks[:2]
        return made

    return build


_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "hidden_size": 32}

BUILDERS: dict[tuple[str, str], Callable[[], Any]] = {
    ("vllm_omni", "flux"): _omni(
        "flux.flux_transformer",
        "FluxTransformer2DModel",
        {"num_layers": 2},
        in_channels=4,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    ),
    ("vllm_omni", "wan"): _omni(
        "wan2_2.wan2_2_transformer",
        "WanTransformer3DModel",
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    ),
    ("vllm_omni", "qwen_image"): _omni(
        "qwen_image.qwen_image_transformer",
        "QwenImageTransformer2DModel",
        {},
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ),
    ("vllm_omni", "sd3"): _omni("sd3.sd3_transformer", "SD3Transformer2DModel", SD3),
    ("vllm_omni", "z_image"): _omni(
        "z_image.z_image_transformer",
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 32, 32],
    ),
    ("sglang", "flux"): _sglang(
        "flux",
        "FluxTransformer2DModel",
        "flux.FluxConfig",
        **_SMALL,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    ),
    ("sglang", "wan"): _sglang(
        "wanvideo",
        "WanTransformer3DModel",
        "wanvideo.WanVideoConfig",
        **_SMALL | {"attention_head_dim": 12, "hidden_size": 24},
        num_layers=3,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
    ),
    ("sglang", "qwen_image"): _sglang(
        "qwen_image",
        "QwenImageTransformer2DModel",
        "qwenimage.QwenImageDitConfig",
        **_SMALL | {"in_channels": 16},
        num_layers=3,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    ),
    ("sglang", "sd3"): _sglang(
        "stablediffusion3",
        "SD3Transformer2DModel",
        "stablediffusion3.StableDiffusion3TransformerConfig",
        **_SMALL | SD3,
    ),
    ("sglang", "z_image"): _sglang(
        "zimage",
        "ZImageTransformer2DModel",
        "zimage.ZImageDitConfig",
        num_layers=2,
        n_refiner_layers=1,
        dim=64,
        num_attention_heads=2,
        n_kv_heads=2,
        in_channels=4,
        cap_feat_dim=16,
        axes_dims=[8, 12, 12],
        axes_lens=[64, 32, 32],
        hidden_size=64,
    ),
    ("diffsynth", "flux"): _diffsynth("flux_dit", "FluxDiT", num_blocks=2),
    ("diffsynth", "wan"): _diffsynth(
        "wan_video_dit",
        "WanModel",
        dim=24,
        in_dim=4,
        ffn_dim=32,
        out_dim=4,
        text_dim=16,
        freq_dim=16,
        eps=1e-6,
        patch_size=(1, 2, 2),
        num_heads=2,
        num_layers=3,
        has_image_input=False,
    ),
    ("diffsynth", "qwen_image"): _diffsynth("qwen_image_dit", "QwenImageDiT", num_layers=3),
    ("diffsynth", "z_image"): _diffsynth("z_image_dit", "ZImageDiT", n_layers=2, n_refiner_layers=1),
}
"""DiffSynth 2.1.12 has no Stable Diffusion 3."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Draw an argument of a model."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def prompts(width: int, pooled: int) -> list[dict[str, Tensor]]:
    """Draw what a model with pooled prompts is called with for the two branches of guidance."""
    return [
        {"encoder_hidden_states": draw(1, 5, width, seed=n), "pooled_projections": draw(1, pooled, seed=9 + n)}
        for n in (0, 1)
    ]


def flux_positions() -> Tensor:
    """Return the positions of 5 words and of 4 x 4 tokens of a picture, as FLUX takes them."""
    places = torch.zeros(21, 3)
    places[5:, 1], places[5:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return places


def path_of(model: Any) -> str:
    """Return the module path and the name of a model's class."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


def recorded() -> dict[tuple[str, str], tuple[str, str]]:
    """Return the class path and the tree as JSON text of each recorded model, by engine and family."""
    entries = json.loads(RECORDED.read_text("utf-8"))
    return {(entry["engine"], entry["family"]): (entry["class"], json.dumps(entry["tree"])) for entry in entries}


def record() -> None:
    """Record the trees of the engines that can be imported; the others stay as they were."""
    from cachepolicy.engine.introspection import describe
    from cachepolicy.planning.module_tree import tree_to_json

    kept = {(entry["engine"], entry["family"]): entry for entry in json.loads(RECORDED.read_text("utf-8"))}
    for (engine, family), build in BUILDERS.items():
        try:
            model = build()
        except ImportError:
            continue
        tree = json.loads(tree_to_json(describe(model)))
        kept[engine, family] = {"engine": engine, "family": family, "class": path_of(model), "tree": tree}
    lines = ",\n".join(json.dumps(kept[key], separators=(",", ":")) for key in BUILDERS if key in kept)
    RECORDED.write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    if not RECORDED.exists():
        RECORDED.write_text("[]", "utf-8")
    record()
