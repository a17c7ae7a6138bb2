"""What fuzzing holds of any bytes holds of every policy of the checkout, and of what once went wrong."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz import corpus, json_form, parser

TEXTS, FORMS = ([seed for seed in seeds if len(seed) <= corpus.LARGEST] for seeds in (corpus.texts(), corpus.forms()))


@pytest.mark.parametrize("seeds", [TEXTS[at : at + 20] for at in range(0, len(TEXTS), 20)], ids=len)
def test_texts_hold(seeds: list[bytes]) -> None:
    """Every text that fuzzing starts from."""
    for seed in seeds:
        parser.hold(seed)


@pytest.mark.parametrize("seeds", [FORMS[at : at + 20] for at in range(0, len(FORMS), 20)], ids=len)
def test_forms_hold(seeds: list[bytes]) -> None:
    """Every JSON form that fuzzing starts from."""
    for seed in seeds:
        json_form.hold(seed)


@given(st.binary(max_size=60))
def test_bytes_hold(data: bytes) -> None:
    """Bytes that are no policy are refused, and nothing else happens."""
    parser.hold(data)
    json_form.hold(data)


@given(st.sampled_from(FORMS), st.lists(st.integers(0, 2**31), min_size=1, max_size=5))
def test_changed_forms_hold(form: bytes, seeds: list[int]) -> None:
    """A form that was changed here and there is a policy or is refused."""
    for seed in seeds:
        form = json_form.mutate(form, seed) or form
    json_form.hold(form)


@given(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.integers(0, 2**31))
def test_spliced_texts_hold(one: bytes, other: bytes, seed: int) -> None:
    """Two texts that were cut and put together are a policy or are refused."""
    dice = random.Random(seed)
    cut = [dice.randrange(len(each) + 1) for each in (one, other)]
    word = dice.choice(corpus.words("cp")).encode()
    parser.hold(one[: cut[0]] + word + other[cut[1] :])


def test_the_dictionary_is_in_the_fuzzers_form() -> None:
    """One quoted word a line, in ASCII, without an escape that the fuzzer does not know."""
    for suffix in ("cp", "json"):
        lines = corpus.dictionary(suffix).splitlines()
        assert len(lines) > 50
        assert all(line[0] == line[-1] == '"' and line.isascii() and "\\n" not in line for line in lines)


def test_what_is_broken_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A printer that loses rules does not hold, nor does a loader that raises anything but `PolicyError`."""
    monkeypatch.setattr(parser.cachepolicy, "format", lambda _: "\n")
    with pytest.raises(AssertionError):
        parser.hold(b"match attention every 2 -> reuse\n")
    monkeypatch.setattr(json_form.cachepolicy, "load", lambda _: {}["statements"])
    with pytest.raises(KeyError):
        json_form.hold(b"{}")
