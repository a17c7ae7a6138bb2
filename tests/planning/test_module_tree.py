"""Models as data: the built-in ones, those from names, and their files."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachepolicy.errors import PolicyError
from cachepolicy.planning.module_tree import (
    Module,
    Skeleton,
    ancestors,
    builtin,
    read_tree,
    sites_skeleton,
    tree_from_json,
    tree_to_json,
    write_tree,
)

parts = st.sampled_from(["blocks", "attn1", "attn2", "cross_attn", "ff", "mlp", "norm1", "0", "1", "12", "to_q"])
roots = st.sampled_from(["blocks", "layers", "transformer_blocks", "norm_out"])
names = st.lists(st.builds(lambda root, rest: ".".join([root, *rest]), roots, st.lists(parts, max_size=4)), max_size=12)


@given(names)
def test_names_make_a_tree(given_names: list[str]) -> None:
    """Every named module is there once, and each stands after what holds it."""
    skeleton = sites_skeleton(given_names)
    assert set(given_names) <= set(skeleton.position)
    assert len(skeleton.position) == len(skeleton.modules)
    for module in skeleton.modules[1:]:
        parent = next(ancestors(module.name))
        assert skeleton.position[parent] < skeleton.position[module.name]


@given(names)
def test_json_gives_the_skeleton_back(given_names: list[str]) -> None:
    """A skeleton survives its file."""
    skeleton = sites_skeleton(given_names)
    assert skeleton == tree_from_json(tree_to_json(skeleton))


def test_a_key_that_stands_twice_is_refused() -> None:
    """At the top, and in a module."""
    text = tree_to_json(builtin())
    for key in ("name", "class_name"):
        start = text.index(f'"{key}"', text.index('"modules"') if key == "class_name" else 0)
        with pytest.raises(PolicyError, match=f"E210.*the key `{key}` stands twice"):
            tree_from_json(f'{text[:start]}"{key}": "x", {text[start:]}')


@given(names)
def test_lists_hold_their_elements_by_number(given_names: list[str]) -> None:
    """`blocks.2` comes before `blocks.10`, in whatever order they were named."""
    skeleton = sites_skeleton(given_names)
    for name, elements in skeleton.elements.items():
        numbers = [int(each.removeprefix(name + ".")) for each in elements]
        assert numbers == sorted(numbers)
        assert not skeleton[name].selectable


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_text_is_a_skeleton_or_an_error(text: str | bytes) -> None:
    """Reading a skeleton fails with a `PolicyError` only."""
    with contextlib.suppress(PolicyError):
        tree_from_json(text)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("transformer_blocks.0", {"block"}),
        ("transformer_blocks.0.attn1", {"attention", "self_attention"}),
        ("transformer_blocks.0.attn2", {"attention", "cross_attention"}),
        ("layers.3.cross_attn", {"attention", "cross_attention"}),
        ("layers.3.self_attention", {"attention", "self_attention"}),
        ("layers.3.ff_context", {"feedforward"}),
        ("layers.3.img_mlp", {"feedforward"}),
        ("layers.3.norm1", set()),
        ("down_blocks.0.attentions.1", set()),
    ],
)
def test_kinds_are_guessed_from_names(name: str, kinds: set[str]) -> None:
    """The last part of a name tells its kind."""
    assert kinds == sites_skeleton([name])[name].kinds


def test_builtin_has_every_kind() -> None:
    """What shipped policies select is there, with the blocks in the order they run."""
    skeleton = builtin()
    kinds = {kind for module in skeleton.modules for kind in module.kinds}
    assert {"attention", "self_attention", "cross_attention", "feedforward", "block", "model"} == kinds
    assert ("transformer_blocks", "temporal_transformer_blocks", "single_transformer_blocks") == skeleton.block_lists
    assert skeleton == tree_from_json(tree_to_json(skeleton))


@pytest.mark.parametrize(
    ("modules", "lists", "fault"),
    [
        ((Module("a", "A"),), (), "the first module is the root"),
        ((Module("", "M"), Module("a", "A"), Module("a", "A")), (), "`a` stands there twice"),
        ((Module("", "M"), Module("a.b", "A")), (), "`a.b` comes before `a`"),
        ((Module("", "M"), Module("a", "A")), ("a",), "`a` of `block_lists` is no list"),
    ],
)
def test_faults_are_named(modules: tuple[Module, ...], lists: tuple[str, ...], fault: str) -> None:
    """A file whose modules are no tree is refused with the reason."""
    with pytest.raises(PolicyError, match=fault):
        tree_from_json(tree_to_json(Skeleton("m", modules, lists)))


def test_files(tmp_path: Path) -> None:
    """A skeleton is written and read; what is no file of one is an error."""
    path = tmp_path / "model.json"
    write_tree(builtin(), path)
    assert builtin() == read_tree(path)
    for wrong in (tmp_path, tmp_path / "none.json", "a\0b"):
        with pytest.raises(PolicyError):
            read_tree(wrong)


@pytest.mark.parametrize("name", ["", "a..b", ".a", "a.", "x" * 2000])
def test_names_that_are_none(name: str) -> None:
    """A name is parts joined by dots."""
    with pytest.raises(PolicyError, match="E211"):
        sites_skeleton([name])


def test_equal_skeletons_are_equal_texts():
    """The order of a module's kinds, which a set does not keep, does not show in JSON."""
    one = Skeleton("m", (Module("", "M", frozenset({"model"})), Module("a", "A", frozenset(["attention", "block"]))))
    assert '"attention",\n    "block"' in tree_to_json(one)
    assert tree_to_json(one) == tree_to_json(tree_from_json(tree_to_json(one)))
