"""`within`, strides, and masks by site, on the built-in transformer."""

from __future__ import annotations

import pytest

from cachepolicy.errors import PolicyError
from cachepolicy.language.parser import parse, parse_selector, recover
from cachepolicy.planning.module_tree import builtin
from cachepolicy.planning.selectors import select
from cachepolicy.planning.simulation import plan, simulate


def taken(selector: str) -> list[str]:
    return [modules[0] for modules in select(parse_selector(selector), builtin())]


@pytest.mark.parametrize(
    ("selector", "same"),
    [
        ("attention within each blocks[2:-2:2]", '"^(transformer|temporal|single)" and attention and ({})'),
        ('feedforward within "^transformer_blocks.[0-9]$"', 'feedforward and "^transformer_blocks"'),
        ('"attn" within blocks[:2]', '"^transformer_blocks\\.[01]\\..*attn"'),
        ("attention within model", "attention"),
        ("block within model", "block"),
        ("block within block", "nothing"),
        ('not "ff" and "to_q" within attention within "^single"', '"^single.*attn.to_q"'),
        ('attention or "proj" within "^transformer_blocks\\.3$"', "attention"),
    ],
)
def test_within(selector: str, same: str) -> None:
    """The modules strictly inside; it binds before `not`, `and` and `or`, from left to right."""
    if same == "nothing":
        assert [] == taken(selector)
    elif "{}" in same:
        blocks = taken("each blocks")[2:-2:2]
        inside = [name for name in taken("attention") if name.rpartition(".")[0] in blocks]
        assert inside == taken(selector)
        assert len(inside) > len(blocks)
    else:
        assert taken(same) == taken(selector)


def test_what_is_inside_an_attention_that_is_inside_a_block() -> None:
    """The outermost rule holds for the result, so that the inner modules are sites where the selector says so."""
    assert ["single_transformer_blocks.1.attn.to_q"] == taken('"to_q" within attention within "^single.*1$"')


@pytest.mark.parametrize(
    ("stride", "blocks"), [("::3", slice(None, None, 3)), ("1:9:4", slice(1, 9, 4)), ("-5::2", slice(-5, None, 2))]
)
def test_strides(stride: str, blocks: slice) -> None:
    """As Python's slices."""
    assert taken("each blocks")[blocks] == taken(f"each blocks[{stride}]")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("match blocks[::2] every 2 -> reuse", "E119"),
        ("match blocks within model every 2 -> reuse", "E119"),
        ("match attention within blocks[::2] every 2 -> reuse", None),
        ("match each blocks[::0] every 2 -> reuse", "E124"),
        ("match each blocks[::-1] every 2 -> reuse", "E124"),
        ("match attention mask letters by site -> reuse", "E101"),
        ("param letters: string = '1'\nmatch attention mask letters by site -> reuse", "E110"),
        ('match attention mask "1,0, 1" -> reuse', None),
        ('match attention mask " ," -> reuse', "E118"),
        ('match attention mask "1;0" -> reuse', "E118"),
    ],
)
def test_where_the_words_may_stand(text: str, code: str | None) -> None:
    """Faults are found without a model."""
    assert [code] * (code is not None) == [each.code for each in recover(text + "\n")[1] if each.severity == "error"]


MASKS = "param masks: list = [{}]\nmatch '^single.*attn$' mask masks by site -> reuse\n"


def test_a_mask_for_each_site() -> None:
    """In the order of the plan; the rows may be pasted with commas."""
    schedule = simulate(parse(MASKS.format('"1100", "1,0,1,0", "1 1 1 1", "1000"')), steps=4)
    assert ["CCRR", "CRCR", "CCCC", "CRRR"] == list(schedule.rows.values())


@pytest.mark.parametrize(
    ("masks", "code"),
    [
        ('"1100", "1010"', "E214"),
        ('"1", "0", "1", "11"', "E163"),
        ('"1", "0", "1", "x"', "E163"),
        ("1, 0, 1, 1", "E163"),
    ],
)
def test_masks_that_do_not_fit(masks: str, code: str) -> None:
    """Another number of rows or letters is an error."""
    with pytest.raises(PolicyError, match=code):
        plan(parse(MASKS.format(masks)))


def test_masks_of_another_length_than_the_run_are_an_error() -> None:
    """As a mask for all sites."""
    with pytest.raises(PolicyError, match="E251"):
        simulate(parse(MASKS.format('"11", "11", "11", "11"')), steps=4)


def test_masks_by_site_that_are_off() -> None:
    """The rule is absent, as with any schedule."""
    policy = parse(
        "param masks: list? = off\nmatch '^single' mask masks by site -> reuse\nmatch attention every 2 -> reuse\n"
    )
    assert "CRCR" == simulate(policy, steps=4).rows["single_transformer_blocks.0.attn"]


def test_a_mask_for_the_one_site_of_a_span() -> None:
    """A span is one site."""
    policy = parse("param masks: list = ['1010']\nmatch blocks[1:] mask masks by site -> reuse\n")
    assert ["CRCR"] == list(simulate(policy, steps=4).rows.values())
