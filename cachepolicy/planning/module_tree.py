"""The module tree of a model as data: names, classes, kinds and the lists that hold the blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import ConfigDict, Field, PlainSerializer, TypeAdapter

from cachepolicy._strict_json import InvalidDocumentError, validate_json
from cachepolicy.diffusers.module_names import ATTENTION, CROSS_ATTENTION, FEEDFORWARD, SELF_ATTENTION
from cachepolicy.errors import PolicyError
from cachepolicy.language.ir import Kind
from cachepolicy.language.presets import ModelFacts

MODULE_TREE_LIMIT = 64 * 2**20
"""Largest size of a file in bytes. The largest model of diffusers takes about 1 MiB."""

ShortText = Annotated[str, Field(max_length=1000)]
Kinds = Annotated[frozenset[Kind], PlainSerializer(sorted, list[str], "json")]
"""Sorted in JSON, so that equal trees have equal texts."""


# Frozen for the type checker only: models have thousands, and `__init__` of a frozen class takes four times as long.
@dataclass(frozen=TYPE_CHECKING, slots=True, unsafe_hash=True)
class Module:
    """One module.

    Attributes:
        name: Qualified name; the name of the root is "".
        class_name: Name of its class.
        kinds: Its kinds.
        is_list: Whether it is a ModuleList.
        callable: Whether it has a forward; containers have none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: ShortText
    class_name: ShortText
    kinds: Kinds = frozenset()
    is_list: bool = False
    callable: bool = True

    @property
    def selectable(self) -> bool:
        """True where selectors can take the module."""
        return self.callable and not self.is_list


@dataclass(frozen=True)
class Skeleton:
    """The module tree of a model as data.

    Attributes:
        name: Name of the model in reports.
        modules: The modules in `named_modules` order, the root first.
        block_lists: Names of the ModuleLists directly under the root whose elements pass on the hidden states, in the
            order they run.
        facts: What presets ask of the model; None if only its modules are known.
        sharing: Names of the ModuleLists that hold a module which is also at another place. It has one name, so the
            elements of these lists have no positions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: ShortText
    modules: Annotated[tuple[Module, ...], Field(min_length=1, max_length=200_000)]
    block_lists: Annotated[tuple[ShortText, ...], Field(max_length=1000)] = ()
    facts: ModelFacts | None = None
    sharing: Annotated[tuple[ShortText, ...], Field(max_length=1000)] = ()

    @cached_property
    def position(self) -> Mapping[str, int]:
        """The position of each module in `modules`, by name."""
        return {module.name: index for index, module in enumerate(self.modules)}

    @cached_property
    def elements(self) -> Mapping[str, tuple[str, ...]]:
        """The elements of each ModuleList in numeric order."""
        lists: dict[str, list[str]] = {module.name: [] for module in self.modules if module.is_list}
        for module in self.modules:
            list_name, _, last = module.name.rpartition(".")
            if list_name in lists and last.isdecimal():
                lists[list_name].append(module.name)
        return {name: tuple(sorted(elements, key=_number)) for name, elements in lists.items()}

    @cached_property
    def block_order(self) -> Mapping[str, int]:
        """The order in which the blocks run, by name."""
        blocks = [block for name in self.block_lists for block in self.elements[name]]
        return {block: index for index, block in enumerate(blocks)}

    def __getitem__(self, name: str) -> Module:
        return self.modules[self.position[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.position


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


def ancestors(name: str) -> Iterator[str]:
    """Yields the names of the modules around `name`, the nearest first, the root ("") last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


# --- files -----------------------------------------------------------------------------------------------

_FILE = TypeAdapter(Skeleton)


def tree_to_json(skeleton: Skeleton) -> str:
    """Returns a module tree as JSON text, which `tree_from_json` reads."""
    return _FILE.dump_json(skeleton, indent=1).decode()


def tree_from_json(text: str | bytes) -> Skeleton:
    """Returns the module tree that a JSON text describes.

    Raises:
        PolicyError: E210, the text is too large, no JSON, or no module tree.
    """
    if len(text) > MODULE_TREE_LIMIT:
        raise PolicyError.of("E210", f"a skeleton of {len(text)} bytes; at most {MODULE_TREE_LIMIT} are read")
    try:
        skeleton = validate_json(text, _FILE.validate_json)
    except InvalidDocumentError as error:
        raise PolicyError.of("E210", f"no skeleton of a model: {error}") from error
    problem = fault(skeleton)
    if problem is not None:
        raise PolicyError.of("E210", f"no skeleton of a model: {problem}")
    return skeleton


def fault(skeleton: Skeleton) -> str | None:
    """Returns why the modules are no tree with a root, None where they are one."""
    if skeleton.modules[0].name != "":
        return 'the first module is the root, whose name is ""'
    seen = set[str]()
    for module in skeleton.modules:
        if module.name in seen:
            return f"`{module.name}` stands there twice"
        parent = module.name.rpartition(".")[0]
        if seen and parent not in seen:
            return f"`{module.name}` comes before `{parent}`, which holds it"
        seen.add(module.name)
    for name in skeleton.block_lists:
        if name not in seen or not skeleton[name].is_list:
            return f"`{name}` of `block_lists` is no list among the modules"
    return None


def read_tree(path: str | os.PathLike[str]) -> Skeleton:
    """Reads a module tree from a JSON file.

    Raises:
        PolicyError: E210, the file cannot be read or holds no module tree.
    """
    try:
        if not Path(path).is_file():
            raise PolicyError.of("E210", f"no file `{os.fspath(path)}`")
        with Path(path).open("rb") as file:
            return tree_from_json(file.read(MODULE_TREE_LIMIT + 1))
    except (OSError, ValueError) as error:
        reason = str(error)
        raise PolicyError.of("E210", f"`{os.fspath(path)}` cannot be read: {reason[:1].lower()}{reason[1:]}") from error


def write_tree(skeleton: Skeleton, path: str | os.PathLike[str]) -> None:
    """Writes a module tree to a JSON file, which `read_tree` reads."""
    Path(path).write_text(tree_to_json(skeleton), encoding="utf-8")


# --- module trees without a model ---------------------------------------------------------------------------


def builtin() -> Skeleton:
    """Returns a generic diffusion transformer, used where `plan` or `expect` are given no model.

    It has eight blocks with self-attention, cross-attention and feed-forward, four temporal blocks as in Latte, and
    four single-stream blocks as in Flux.
    """
    modules = [Module("", "Transformer", frozenset({"model"})), Module("patch_embed", "PatchEmbed")]
    modules += _block_list("transformer_blocks", 8, ("attn1", "attn2", "ff"))
    modules += _block_list("temporal_transformer_blocks", 4, ("attn1", "ff"))
    modules += _block_list("single_transformer_blocks", 4, ("attn",))
    modules += [Module("norm_out", "LayerNorm"), Module("proj_out", "Linear")]
    lists = ("transformer_blocks", "temporal_transformer_blocks", "single_transformer_blocks")
    return Skeleton("builtin", tuple(modules), lists)


def _block_list(name: str, count: int, parts: Sequence[str]) -> list[Module]:
    modules = [Module(name, "ModuleList", is_list=True, callable=False)]
    for index in range(count):
        block = f"{name}.{index}"
        modules.append(Module(block, "TransformerBlock", frozenset({"block"})))
        for number, part in enumerate(parts, 1):
            modules.append(Module(f"{block}.norm{number}", "LayerNorm"))
            kinds = _guessed(part)
            modules.append(Module(f"{block}.{part}", "FeedForward" if "feedforward" in kinds else "Attention", kinds))
            if "attention" in kinds:
                modules += [Module(f"{block}.{part}.{name}", "Linear") for name in ("to_q", "to_k", "to_v")]
                modules.append(Module(f"{block}.{part}.to_out", "ModuleList", is_list=True, callable=False))
                modules += [Module(f"{block}.{part}.to_out.0", "Linear"), Module(f"{block}.{part}.to_out.1", "Dropout")]
            else:
                modules.append(Module(f"{block}.{part}.net", "ModuleList", is_list=True, callable=False))
                modules += [Module(f"{block}.{part}.net.{index}", "Linear") for index in (0, 2)]
    return modules


def _guessed(name: str) -> frozenset[Kind]:
    """Returns the kinds of a module by the last part of its name."""
    if FEEDFORWARD.search(name):
        return frozenset({"feedforward"})
    if not ATTENTION.search(name) and name != "cross":
        return frozenset()
    cross = CROSS_ATTENTION.search(name) and SELF_ATTENTION not in name
    return frozenset({"attention", "cross_attention" if cross else "self_attention"})


def sites_skeleton(names: Sequence[str]) -> Skeleton:
    """Returns a module tree with the given module names; kinds are guessed from the names.

    A number after a dot makes the part before it a list. The elements of a list directly under the root are blocks, and
    the lists run in the order of their first names.

    Args:
        names: Qualified module names.

    Raises:
        PolicyError: E211, a name is empty, too long, or no dotted name.
    """
    modules = {"": Module("", "Model", frozenset({"model"}))}
    for name in names:
        parts = name.split(".")
        if not all(parts) or len(name) > 1000:
            raise PolicyError.of("E211", f"`{name}` is no module name", help="write it as `transformer_blocks.0.attn1`")
        for depth in range(1, len(parts) + 1):
            _grow(modules, parts[:depth])
    ordered = tuple(_in_tree_order(modules))
    lists = tuple(module.name for module in ordered if module.is_list and "." not in module.name)
    return Skeleton("names", ordered, lists)


def _grow(modules: dict[str, Module], parts: Sequence[str]) -> None:
    name, parent, last = ".".join(parts), ".".join(parts[:-1]), parts[-1]
    if last.isdecimal() and parent:
        modules[parent] = Module(parent, "ModuleList", is_list=True, callable=False)
    if name not in modules:
        block = last.isdecimal() and len(parts) == 2
        modules[name] = Module(name, "Module", frozenset({"block"}) if block else _guessed(last))


def _in_tree_order(modules: Mapping[str, Module]) -> Iterator[Module]:
    """Yields parents before children, and children in the order of their names, as `named_modules` does."""
    children: dict[str, list[str]] = {name: [] for name in modules}
    for name in modules:
        if name:
            children[name.rpartition(".")[0]].append(name)
    waiting = [""]
    while waiting:
        name = waiting.pop()
        yield modules[name]
        waiting += reversed(children[name])
