"""Words that were added after policies existed: older policies keep their texts, their meaning and their digests."""

from __future__ import annotations

import pytest

from cachepolicy.language.formatter import format
from cachepolicy.language.ir import Policy
from cachepolicy.language.linker import resolve
from cachepolicy.language.parser import parse, recover
from cachepolicy.language.vocabulary import ADDED_WORDS, CLOCK
from cachepolicy.planning.simulation import simulate
from tests.support import digests


def codes(text: str) -> list[str]:
    return [each.code for each in recover(text)[1]]


def test_present_policies_keep_their_digests() -> None:
    """The digest of a policy that has ever been released stays what it is."""
    known = digests.pinned()
    assert known == {name: digest for name, digest in digests.current().items() if name in known}


def test_what_is_not_said_is_not_in_the_json_form() -> None:
    """A field that was added later is left out where the policy does not use it, and kept where it does."""
    assert "labelled" not in parse("match attention while sum(t) < 3 -> reuse").model_dump_json()
    said = parse("match attention while sum(t, decay: 0.5) < 3 -> reuse")
    assert "labelled" in said.model_dump_json()
    assert said == Policy.model_validate_json(said.model_dump_json())


@pytest.mark.parametrize(
    ("word", "declared"),
    [
        (word, declared)
        for word in sorted(ADDED_WORDS)
        for declared in ("param {}: int = 2", "let {} = 2", "let {} = step + 2")
        if not (word == "self" and declared.startswith("param"))  # an argument of `Run.session`, which takes params
    ],
)
def test_an_added_word_may_be_a_name(word: str, declared: str) -> None:
    """A file that declares the name means what it declares, and is warned."""
    text = declared.format(word) + f"\nmatch attention every {word} -> reuse\n"
    assert "W507" in codes(text)
    other = text.replace(word, "mine")
    assert resolve(parse(text)).digest == resolve(parse(other)).digest
    assert simulate(parse(other), steps=8).rows == simulate(parse(text), steps=8).rows
    assert format(parse(text)).replace(word, "mine") == format(parse(other))


@pytest.mark.parametrize("word", sorted(ADDED_WORDS & CLOCK.keys()))
def test_a_signal_called_like_an_added_word_is_the_signal(word: str) -> None:
    """The numbers that are given for the signal count, and not the clock."""
    text = f"signal {word} = l1(input(model))\nmatch attention while {word} < 1 -> reuse\n"
    row = simulate(parse(text), steps=5, signals={word: [0, 5, 0.5, 0.5, 7]}).rows["transformer_blocks.0.attn1"]
    assert "CCRRC" == row


def test_a_used_policy_reads_the_word_that_its_user_declares_anew(tmp_path) -> None:
    """Params and lets belong to the file that declares them."""
    (tmp_path / "part.cp").write_text("match attention while computes < 2 -> reuse\n")
    (tmp_path / "whole.cp").write_text(
        "param computes: int = 9\nuse 'part.cp'\nmatch feedforward every computes -> reuse\n"
    )
    rows = simulate(tmp_path / "whole.cp", steps=4).rows
    assert "CRRR" == rows["transformer_blocks.0.attn1"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("match attention while sum(t, decay: 1) < 3 -> reuse", []),
        ("match attention while sum(t, decay: true) < 3 -> reuse", ["E111"]),
        ("match attention while sum(t, rate: 1) < 3 -> reuse", ["E108"]),
        ("match attention while sum(t, decay: 1, decay: 1) < 3 -> reuse", ["E108"]),
        ("match attention while product(t, decay: 1) < 3 -> reuse", ["E108"]),
        ("match attention while abs(t - kept(t, rate: 1)) < 3 -> reuse", ["E108"]),
        ("match attention while prev(t, decay: 1) < 3 -> reuse", ["E108"]),
        ("match attention while cross(cond, t, decay: 1) < 3 -> reuse", ["E108"]),
        ("match attention while sum(t, 3) < 3 -> reuse", ["E106"]),
        ("match attention while latch(t) -> reuse", ["E111"]),
        ("match attention while latch(t > 3) -> reuse", []),
        ("match attention while latch(t > 3) > 3 -> reuse", ["E111"]),
        ("match attention while at_step(3) > 3 -> reuse", ["E106"]),
        ("match attention when total(t) > 3 -> reuse", ["E115"]),
        ("match attention when latch(t > 3) -> reuse", ["E115"]),
        ("match attention when gap > 3 and computes < floor(t) -> reuse", []),
        ("match attention while kept(total(t)) > 3 -> reuse", ["E115"]),
        ("match attention -> predict linear(weight: total(t))", ["E115"]),
        ("match attention -> predict linear(weight: gap / age)", []),
        ("match attention every computes / 2 -> reuse", ["W505"]),
        ("match attention every floor(computes / 2) -> reuse", []),
        ("match attention while latch(abs(t - prev(t)) < 3) -> reuse", ["W502"]),
        ("match attention while total(abs(t - prev(t))) < 3 -> reuse", []),
    ],
)
def test_types_and_places(text: str, found: list[str]) -> None:
    """Accumulators stand in `while`, take what they say, and the new clock words stand where others do."""
    assert found == codes(text + "\n")
