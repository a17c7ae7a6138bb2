"""Reads live models: their module trees with kinds, and the denoisers of a pipeline."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Attributes of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import functools
import inspect
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

from cachepolicy.diffusers.denoisers import DENOISER_PACKAGES, DENOISERS
from cachepolicy.diffusers.module_names import (
    ATTENTION,
    ATTENTION_CLASSES,
    BLOCK,
    CONTEXT_ARGUMENTS,
    CROSS_ATTENTION,
    EMBEDDER,
    FEEDFORWARD,
    FEEDFORWARD_CLASS,
    FEEDFORWARD_CLASSES,
    FUSED_WORDS,
    JOINT_ATTENTION,
    KEY_WORDS,
    KEYS,
    OUTPUT_WORDS,
    QUERIES,
    QUERY_WORDS,
    SELF_ATTENTION,
    SIDE_LIST,
)
from cachepolicy.errors import PolicyError
from cachepolicy.language.ir import Kind
from cachepolicy.language.presets import ModelFacts
from cachepolicy.planning.module_tree import Module, Skeleton, ancestors


def is_pipeline(target: Any) -> bool:
    """Return True for a diffusers pipeline: a callable with `components` that is no module."""
    return not isinstance(target, nn.Module) and callable(target) and hasattr(target, "components")


def unwrapped(target: Any) -> Any:
    """Return the model inside wrappers that call it: `torch.compile(model)`, a `PeftModel`, a distributed replica.

    A wrapper has none of the model's classes and paths, and it calls the model as `model(...)`. Therefore hooks are
    placed on the model. Anything that is no wrapper is returned as it is.
    """
    peft = sys.modules.get("peft")
    while True:
        if isinstance(target, OptimizedModule):
            target = target.get_submodule("_orig_mod")
        elif isinstance(target, nn.DataParallel | nn.parallel.DistributedDataParallel):
            target = target.module
        elif peft is not None and isinstance(target, peft.PeftModel):
            target = target.get_base_model()
        else:
            return target


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by path.

    A module that was replaced by `torch.compile(module)` keeps its path: the wrapper has the same attributes, so that
    `get_submodule` of the path works with and without it.
    """
    # The module inside comes after its wrapper, and takes its place.
    return {
        name if "_orig_mod" not in name else ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in walk(model)
    }


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return what `model.named_modules()` yields, in less time: `apply` visits all modules several times."""
    found, seen = list[tuple[str, nn.Module]](), set[nn.Module]()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found.append((path, module))
        children: Mapping[str, nn.Module | None] = module._modules  # noqa: SLF001 (as torch's own functions)  # pyright: ignore[reportPrivateUsage]
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]
    return found


def denoisers(target: Any) -> dict[str, nn.Module]:
    """Return the root models of a target by the names of their attributes. A module is its own root, named "".

    Of a wrapped model, the root is the model inside.

    Raises:
        PolicyError: The target is neither a module nor a pipeline with a denoiser (E300).
    """
    if isinstance(target, nn.Module):
        return {"": unwrapped(target)}
    if not is_pipeline(target):
        raise PolicyError.of(
            "E300",
            f"a policy cannot be applied to `{type(target).__name__}`",
            help="pass an `nn.Module` or a diffusers pipeline",
        )
    models = dict[str, nn.Module]()
    for name, component in target.components.items():
        model = unwrapped(component)
        if isinstance(model, nn.Module) and (name in DENOISERS or _is_denoiser(model)):
            models.setdefault(name, model)
    if not models:
        raise PolicyError.of(
            "E300",
            f"`{type(target).__name__}` has no denoiser",
            help="pass the model itself: `cachepolicy.apply(pipe.transformer, ...)`",
        )
    return models


def _is_denoiser(component: nn.Module) -> bool:
    return type(component).__module__.startswith(DENOISER_PACKAGES)


def describe(model: nn.Module) -> Skeleton:
    """Return the module tree of a live model: names, classes and kinds of its modules, and the lists of its blocks."""
    paths = modules_by_path(model)
    named = list(paths.items())
    # Read once, because another thread may swap the class of a module meanwhile.
    types = [type(module) for _, module in named]
    classes = {kind: _ClassFacts.of(kind) for kind in set(types)}
    native = any(facts.attention for facts in classes.values())
    modules = list[Module]()
    attentions = set[str]()
    for (name, module), kind in zip(named, types, strict=True):
        facts, kinds = classes[kind], _NO_KINDS
        if name == "":
            kinds = frozenset[Kind]({"model"})
        elif (
            facts.attention
            if native
            else _looks_like_attention(module)
            or (_projects(module) and attentions.isdisjoint(ancestors(name)))
            or _is_core_in_a_block(module, paths.get(name.rpartition(".")[0]))
        ):
            if _has_weights(module) or attentions.isdisjoint(ancestors(name)):  # not the core of another attention
                kinds = frozenset[Kind](
                    {"attention", "cross_attention" if _is_cross(name, module) else "self_attention"}
                )
                attentions.add(name)
        elif facts.feedforward or (
            not facts.is_list
            and (facts.is_called_feedforward or _is_called_feedforward(name.rpartition(".")[2]))
            and _has_children(module)
            and not EMBEDDER.search(name)
        ):
            kinds = frozenset[Kind]({"feedforward"})
        modules.append(Module(name, facts.name, kinds, facts.is_list, not facts.is_container))
    lists = _block_lists(model, modules)
    # A module that a list holds twice has one name, so the elements are not numbered from 0 without gaps.
    blocks = {f"{name}.{index}" for name in lists for index, _ in model.get_submodule(name).named_children()}
    block = frozenset[Kind]({"block"})
    for index, entry in enumerate(modules):
        if entry.name in blocks:
            modules[index] = replace(entry, kinds=entry.kinds | block)
    sharing = tuple(
        name
        for name, module in named
        if isinstance(module, nn.ModuleList) and not {f"{name}.{index}" for index in range(len(module))} <= paths.keys()
    )
    skeleton = Skeleton(type(model).__name__, tuple(modules), tuple(lists), sharing=sharing)
    return replace(skeleton, facts=_facts(model, list(skeleton.block_order)))


_NO_KINDS = frozenset[Kind]()


@dataclass(frozen=True, slots=True)
class _ClassFacts:
    """What `describe` reads of a class of modules. Models have many modules of few classes."""

    name: str
    attention: bool
    feedforward: bool
    is_called_feedforward: bool
    is_list: bool
    is_container: bool

    @staticmethod
    def of(kind: type[nn.Module]) -> _ClassFacts:
        paths = {f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__}
        return _ClassFacts(
            kind.__name__,
            not ATTENTION_CLASSES.isdisjoint(paths),
            not FEEDFORWARD_CLASSES.isdisjoint(paths),
            FEEDFORWARD_CLASS.search(kind.__name__) is not None,
            issubclass(kind, nn.ModuleList),
            issubclass(kind, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict),
        )


_ENTRIES = 2000  # number of entries of a configuration that are read


def _facts(model: nn.Module, blocks: Sequence[str]) -> ModelFacts:
    """Return what presets ask of a model."""
    config = getattr(model, "config", None)
    entries: Any = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    scalars = [(name, value) for name, value in entries.items() if isinstance(name, str) and _is_entry(value)]
    return ModelFacts(type(model).__name__, _stream_width(model, blocks), len(blocks), tuple(scalars[:_ENTRIES]))


def _is_entry(value: Any) -> bool:
    """Return whether a value of a configuration is one that presets can read."""
    finite = not isinstance(value, float) or math.isfinite(value)
    return isinstance(value, int | float | bool | str) and finite and len(str(value)) <= 1000


def _stream_width(model: nn.Module, blocks: Sequence[str]) -> int | None:
    """Return the channels of the block stream: the most frequent input size of the linear layers of a block."""
    for name in blocks:
        linears = [layer for layer in model.get_submodule(name).modules() if isinstance(layer, nn.Linear)]
        sizes = Counter(layer.in_features for layer in linears)
        if sizes:
            return sizes.most_common(1)[0][0]
    return None


def is_one_of(module: nn.Module, paths: frozenset[str]) -> bool:
    """Return True if the class of a module or one of its bases has one of these paths.

    Paths are compared instead of classes, so that nothing is imported.
    """
    return any(f"{base.__module__}.{base.__qualname__}" in paths for base in type(module).__mro__)


def _has_children(module: nn.Module) -> bool:
    # `children` takes ten times as long, and this runs for each module.
    return any([child is not None for child in vars(module)["_modules"].values()])


def _looks_like_attention(module: nn.Module) -> bool:
    """Return True for attention that is none of diffusers' classes, by its name and its weights.

    The module that holds the projections is the attention. A core without weights inside it (vLLM's `Attention`) is a
    part of it. A block that is named after its attention contains one with weights.
    """
    if isinstance(module, nn.MultiheadAttention):
        return True
    kind = type(module).__name__
    if not ATTENTION.search(kind) or isinstance(module, nn.ModuleList) or not _has_children(module):
        return False
    inner = [child for child in module.modules() if child is not module and ATTENTION.search(type(child).__name__)]
    if not inner:
        return True
    return not BLOCK.search(kind) and _has_weights(module) and not any(map(_has_weights, inner))


def _is_core_in_a_block(module: nn.Module, parent: nn.Module | None) -> bool:
    """Return True for attention without weights whose projections are in the block itself, as in SGLang's Wan."""
    core = ATTENTION.search(type(module).__name__) is not None and not _has_children(module)
    return core and parent is not None and BLOCK.search(type(parent).__name__) is not None and _has_projections(parent)


def _has_weights(module: nn.Module) -> bool:
    """Return True if a module has parameters, or layers that keep their weights elsewhere, as quantised ones do."""
    # `parameters` takes ten times as long, because it finds parameters that occur twice.
    waiting: list[nn.Module | None] = [module]
    while waiting:
        layer = waiting.pop()
        if layer is None:
            continue
        if "Linear" in type(layer).__name__ or any([value is not None for value in layer._parameters.values()]):  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
            return True
        waiting += layer._modules.values()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return False


@functools.cache
def _is_called_feedforward(last: str) -> bool:
    return FEEDFORWARD.search(last) is not None


def _is_cross(name: str, module: nn.Module) -> bool:
    """Return True if keys and values come from another sequence than the queries.

    `is_cross_attention` of the module decides, then two streams with queries or outputs of their own (joint attention,
    whatever it is called), then names, then a second sequence without which the forward cannot be called, then the
    input widths of the projections.
    """
    last = name.rpartition(".")[2]
    if SELF_ATTENTION in last:
        return False
    marked = getattr(module, "is_cross_attention", None)
    if isinstance(marked, bool):
        return marked
    if _is_joint(module):
        return False
    processor = type(getattr(module, "processor", None)).__name__
    if "Cross" in type(module).__name__ or "Cross" in processor or CROSS_ATTENTION.search(last):
        return True
    if isinstance(module, nn.MultiheadAttention):
        return module.kdim != module.embed_dim
    if not is_one_of(module, ATTENTION_CLASSES) and _needs_context(module):
        return True
    queries, keys = (_width(_first_of(module, names)) for names in (QUERIES, KEYS))
    return queries is not None and keys is not None and queries != keys


def _needs_context(module: nn.Module) -> bool:
    """Return True if the forward has a parameter for another sequence, and no default for it."""
    parameters = inspect.signature(module.forward).parameters
    return any(
        parameter.default is parameter.empty and CONTEXT_ARGUMENTS.search(name)
        for name, parameter in parameters.items()
    )


def _is_joint(module: nn.Module) -> bool:
    """Return True for attention over two streams that both have queries, and both get an output."""
    if "Joint" in type(module).__name__ or any(JOINT_ATTENTION.search(name) for name, _ in module.named_children()):
        return True
    words = _words_of_projections(module)
    return any(sum(bool(tokens & asked) for tokens in words) > 1 for asked in (QUERY_WORDS, OUTPUT_WORDS))


def _projects(module: nn.Module) -> bool:
    """Return True for a module with projections to queries and keys, whatever it is called, that is no block."""
    if BLOCK.search(type(module).__name__) or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    return _has_projections(module)


def _has_projections(module: nn.Module) -> bool:
    """Return True if children of a module project to queries and keys."""
    words = set[str]().union(*_words_of_projections(module))
    return bool(words & FUSED_WORDS or (words & QUERY_WORDS and words & KEY_WORDS))


def _words_of_projections(module: nn.Module) -> list[frozenset[str]]:
    """Return the words in the names of each child with weights that is no norm."""
    children = [name for name, child in module.named_children() if "norm" not in name and _has_weights(child)]
    return list(map(_words, children))


@functools.cache
def _words(name: str) -> frozenset[str]:
    return frozenset(re.split(r"[_\W]|(?<=\D)(?=\d)", name))


def _width(projection: Any) -> int | None:
    """Return the input width of a projection, by the names of `nn.Linear` and of vLLM's parallel layers."""
    for name in ("in_features", "input_size"):
        width = getattr(projection, name, None)
        if isinstance(width, int):
            return width
    return None


def _first_of(module: nn.Module, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def _block_lists(model: nn.Module, modules: list[Module]) -> list[str]:
    """Return the names of the ModuleLists under the root that carry the hidden states, in registration order."""
    attentions = [module.name for module in modules if "attention" in module.kinds]
    lists = list[str]()
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList) or len(child) == 0 or SIDE_LIST.search(name):
            continue
        # A block may be its own attention, with one layer for queries, keys, values and more (DiffSynth's FLUX).
        with_attention = any(attention.startswith(f"{name}.") for attention in attentions) or _has_projections(child[0])
        if with_attention or (not attentions and any(True for _ in child[0].children())):
            lists.append(name)
    return lists
