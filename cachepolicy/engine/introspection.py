"""What a live model is made of: its skeleton with kinds, and the denoisers of a pipeline."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Models are called with anything and return anything: what comes out of it has no type to know.

from __future__ import annotations

import re
import sys
from typing import Any

from torch import nn

from cachepolicy.diffusers.denoisers import DENOISERS
from cachepolicy.errors import PolicyError
from cachepolicy.language.ir import Kind
from cachepolicy.planning.module_tree import Module, Skeleton

_CROSS_NAME = re.compile(r"cross|(^|_)attn2$|_to_.*_attn")
_ATTENTION_CLASS = re.compile(r"attention|attn", re.IGNORECASE)
_FEEDFORWARD_CLASS = re.compile(r"feedforward|mlp$|ffn", re.IGNORECASE)
_FEEDFORWARD_NAME = re.compile(r"(^|_)(ff|ffn|mlp|feed_forward|feedforward)(_context)?\d*$")
_SIDE_LIST = re.compile(r"refiner|vace|text|context|caption|clip|face|audio_proj|controlnet|connector|perceiver")


def is_pipeline(target: Any) -> bool:
    """True for a diffusers pipeline, told by what it offers."""
    return not isinstance(target, nn.Module) and callable(target) and hasattr(target, "components")


def denoisers(target: Any) -> dict[str, nn.Module]:
    """The roots to attach to, by their attribute's name; a plain module is its own root, named "".

    Raises:
        PolicyError: the target is neither a module nor a pipeline with a denoiser.
    """
    if isinstance(target, nn.Module):
        return {"": target}
    if not is_pipeline(target):
        raise PolicyError.of(
            "E300",
            f"a policy cannot be applied to `{type(target).__name__}`",
            help="pass an `nn.Module` or a diffusers pipeline",
        )
    found = dict[str, nn.Module]()
    for name, component in target.components.items():
        if isinstance(component, nn.Module) and (name in DENOISERS or _is_denoiser(component)):
            found.setdefault(name, component)
    if not found:
        raise PolicyError.of(
            "E300",
            f"`{type(target).__name__}` has no denoiser",
            help="pass the model itself: `cachepolicy.apply(pipe.transformer, ...)`",
        )
    return found


def _is_denoiser(component: nn.Module) -> bool:
    module = type(component).__module__
    return module.startswith(("diffusers.models.transformers.", "diffusers.models.unets."))


def describe(model: nn.Module) -> Skeleton:
    """The skeleton of a live model: names, classes, kinds, and the lists that hold its blocks."""
    attention, feedforward = _diffusers_classes()
    named = list(model.named_modules())
    native = any(isinstance(module, attention) for _, module in named) if attention else False
    modules = list[Module]()
    for name, module in named:
        kinds = set[Kind]()
        if name == "":
            kinds.add("model")
        elif isinstance(module, attention) if native else _looks_like_attention(module):
            kinds |= {"attention", "cross_attention" if _is_cross(name, module) else "self_attention"}
        elif isinstance(module, feedforward) or _looks_like_feedforward(name, module):
            kinds.add("feedforward")
        container = isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
        is_list = isinstance(module, nn.ModuleList)
        modules.append(Module(name, type(module).__name__, frozenset(kinds), is_list, not container))
    lists = _block_lists(model, modules)
    blocks = {f"{name}.{index}" for name in lists for index, _ in enumerate(model.get_submodule(name).children())}
    marked = tuple(
        Module(each.name, each.class_name, each.kinds | frozenset[Kind]({"block"}), each.is_list, each.callable)
        if each.name in blocks
        else each
        for each in modules
    )
    return Skeleton(type(model).__name__, marked, tuple(lists))


def _diffusers_classes() -> tuple[tuple[type, ...], tuple[type, ...]]:
    """The classes by which diffusers' own caches find attention and feed-forward; empty where it is not imported."""
    if "diffusers" not in sys.modules:
        return (), ()
    from diffusers.models.attention import FeedForward, LuminaFeedForward
    from diffusers.models.attention_processor import Attention, MochiAttention

    attention: list[type] = [Attention, MochiAttention]
    try:
        from diffusers.models.attention import AttentionModuleMixin

        attention.append(AttentionModuleMixin)
    except ImportError:  # before diffusers 0.35
        pass
    return tuple(attention), (FeedForward, LuminaFeedForward)


def _looks_like_attention(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not _ATTENTION_CLASS.search(type(module).__name__) or isinstance(module, nn.ModuleList):
        return False
    # A block that is named after its attention has one inside; the attention itself holds only its projections.
    return any(True for _ in module.children()) and not any(
        _ATTENTION_CLASS.search(type(child).__name__) for child in module.modules() if child is not module
    )


def _looks_like_feedforward(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList) or not any(True for _ in module.children()):
        return False
    last = name.rpartition(".")[2]
    return bool(_FEEDFORWARD_CLASS.search(type(module).__name__) or _FEEDFORWARD_NAME.search(last))


def _is_cross(name: str, module: nn.Module) -> bool:
    """Whether keys and values come from elsewhere; where the module does not say so, names and projections tell."""
    last = name.rpartition(".")[2]
    if "self" in last:
        return False
    said = getattr(module, "is_cross_attention", None)
    if isinstance(said, bool):
        return said
    processor = type(getattr(module, "processor", None)).__name__
    if "Cross" in type(module).__name__ or "Cross" in processor or _CROSS_NAME.search(last):
        return True
    if isinstance(module, nn.MultiheadAttention):
        return module.kdim != module.embed_dim
    queries = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    keys = getattr(module, "to_k", None) or getattr(module, "to_key", None)
    if isinstance(queries, nn.Linear) and isinstance(keys, nn.Linear):
        return queries.in_features != keys.in_features
    return False


def _block_lists(model: nn.Module, modules: list[Module]) -> list[str]:
    """The ModuleLists directly under the root that carry the hidden states, in the order they are registered."""
    attentions = [each.name for each in modules if "attention" in each.kinds]
    found = list[str]()
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList) or len(child) == 0 or _SIDE_LIST.search(name):
            continue
        with_attention = any(each.startswith(f"{name}.") for each in attentions)
        if with_attention or (not attentions and any(True for _ in child[0].children())):
            found.append(name)
    return found
