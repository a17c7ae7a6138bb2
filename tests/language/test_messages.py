"""Frequent mistakes get a message that shows what is wrong and a help that can be pasted."""

from __future__ import annotations

from typing import Any

import pytest

from cachepolicy.errors import PolicyError
from cachepolicy.language.loader import load
from cachepolicy.language.parser import parse, recover
from cachepolicy.planning.simulation import simulate

TEXTS = [
    ("match attention when progress < 20% -> reuse", "E001", "`%` is the remainder of a division; write `0.2`"),
    ("param share: float = 2.5%", "E004", "`%` is the remainder of a division; write `0.025`"),
    ("match attention at most 20% in all -> reuse", "E001", "`%` is the remainder of a division; write `0.2`"),
    ("match attention at most 3 -> reuse", "E001", "write `at most 3 in a row` or `at most 3 in all`"),
    ("match attention at most 3", "E004", "write `at most 3 in a row` or `at most 3 in all`"),
    ("match attention every 2 -> predict taylor(2)", "E001", "arguments have names: `taylor(order: 2)`"),
    (
        "match attention every 2 -> predict hermite(2, 0.5)",
        "E001",
        "arguments have names: `hermite(order: 2, scale: ...)`",
    ),
    (
        "match model every 2 -> approximate uncond spectral(1.1)",
        "E001",
        "arguments have names: `spectral(low: 1.1, high: ...)`",
    ),
    ("match blocks.*attn every 2 -> reuse", "E002", 'a regex stands in quotes: `"blocks.*attn"`'),
    ("match transformer_blocks.0.attn1 -> reuse", "E002", 'a regex stands in quotes: `"transformer_blocks.0.attn1"`'),
    ("match attention and not ^single every 2 -> reuse", "E002", 'a regex stands in quotes: `"^single"`'),
    ("match (attn1|attn2) every 2 -> reuse", "E002", 'a regex stands in quotes: `"attn1|attn2"`'),
    ("expect transformer.* over 2 steps: C R", "E002", 'a regex stands in quotes: `"transformer.*"`'),
    ("match mlp every 2 -> reuse", "E101", "did you mean `feedforward`?"),
    ("match layers every 2 -> reuse", "E101", "did you mean `blocks`?"),
    ("match layers[1:] every 2 -> reuse", "E001", "did you mean `blocks`?"),
    ("match attn every 2 -> reuse", "E101", "did you mean `attention`?"),
    (
        "match spam every 2 -> reuse",
        "E101",
        'write a regex in quotes, `"spam"`, or declare `param spam: string = "..."`',
    ),
    ("match attention every interval -> reuse", "E101", "declare it: `param interval: int = 2`"),
    ("match attention at most often in a row -> reuse", "E101", "declare it: `param often: int = 2`"),
    ("match attention while 1 < limit -> reuse", "E101", "declare it: `param limit: float = 0.5`"),
    ("match attention when t in window every 2 -> reuse", "E101", "declare it: `param window: range = (100, 800)`"),
    ("match attention on moments -> reuse", "E101", "declare it: `param moments: list = [0, 1, 2]`"),
    ("match attention mask letters -> reuse", "E101", 'declare it: `param letters: string = "..."`'),
    ("match attention when stepp > 2 every 2 -> reuse", "E101", "did you mean the clock word `step`?"),
]


@pytest.mark.parametrize(("text", "code", "help"), TEXTS)
def test_mistakes_in_texts(text: str, code: str, help: str) -> None:
    """One mistake gives one error, with the help for it."""
    assert [(code, help)] == [(found.code, found.help) for found in recover(text)[1]]


@pytest.mark.parametrize("text", [text for text, _, help in TEXTS if help.startswith("declare it")])
def test_an_offered_param_makes_the_policy_sound(text: str) -> None:
    """The declaration that the help offers is one that the statement accepts."""
    help = recover(text)[1][0].help
    assert help is not None
    declaration = help.split("`")[1].replace('"..."', '"1101"')
    assert () == recover(f"{declaration}\n{text}")[1]


@pytest.mark.parametrize(
    ("settings", "message", "help"),
    [
        ({"spatial_every": "3"}, '`spatial_every` takes a whole number, not `"3"`', "write `3` without quotes"),
        ({"spatial_every": "off"}, '`spatial_every` takes a whole number, not `"off"`', "write `off` without quotes"),
        ({"spatial_every": "often"}, '`spatial_every` takes a whole number, not `"often"`', None),
        ({"spatial_every": 3.0}, "`spatial_every` takes a whole number, not `3.0`", "write `3`"),
        ({"spatial_names": "attn"}, '`spatial_names` takes a list, not `"attn"`', 'write `["attn"]`'),
    ],
)
def test_values_of_another_type(settings: dict[str, Any], message: str, help: str | None) -> None:
    """A string is shown in quotes, so that it does not look like the number that was meant."""
    with pytest.raises(PolicyError) as raised:
        simulate("pab", steps=4, **settings)
    assert [("E161", message, help)] == [(each.code, each.message, each.help) for each in raised.value.diagnostics]


class Model:
    """Stands for a torch module or a pipeline, which this package must not import."""

    def __call__(self) -> None: ...
    def forward(self) -> None: ...


@pytest.mark.parametrize(
    ("source", "message", "help"),
    [
        (
            "match attention every 2 -> reuse",
            "this is the text of a policy, and a name or a path is expected",
            "parse the text first: `cachepolicy.parse(text)`",
        ),
        (
            "# mine\nmatch attention every 2 -> reuse\n",
            "this is the text of a policy, and a name or a path is expected",
            "parse the text first: `cachepolicy.parse(text)`",
        ),
        (
            "no_such_method",
            "no shipped policy and no file `no_such_method`",
            "`cachepolicy list` shows the shipped policies",
        ),
        ("first_block_cache", "no shipped policy and no file `first_block_cache`", "its name here is `fbc`"),
        ("Learning-to-Cache", "no shipped policy and no file `Learning-to-Cache`", "its name here is `l2c`"),
        ("TextKVCacheConfig", "no shipped policy and no file `TextKVCacheConfig`", "its name here is `textkv`"),
        ("FirstBlockCacheConfig", "no shipped policy and no file `FirstBlockCacheConfig`", "its name here is `fbc`"),
        (
            Model(),
            "a policy is a name, a path or a `Policy`, not a `Model`",
            "the model is the first argument, the policy the second: `apply(model, policy)`",
        ),
        (3, "a policy is a name, a path or a `Policy`, not a `int`", None),
    ],
)
def test_sources_that_are_no_policy(source: Any, message: str, help: str | None) -> None:
    """A text, the name of an unshipped method and a model each say what to write instead."""
    with pytest.raises(PolicyError) as raised:
        load(source)
    (found,) = raised.value.diagnostics
    assert ("E150", message) == (found.code, found.message)
    assert help == found.help


@pytest.mark.parametrize("name", ["toca", "Lazy-DiT", "mean_cache.cp", "ToCa"])
def test_methods_that_are_not_shipped(name: str) -> None:
    """A method that exists and has no shipped policy is called by its name, with those that are shipped."""
    with pytest.raises(PolicyError) as raised:
        load(name)
    help = raised.value.diagnostics[0].help or ""
    assert "is not shipped; write it as a policy file, or use one of `" in help


def test_a_file_whose_name_looks_like_a_statement(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that starts with a keyword and a space is a path where such a file exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "use mine.cp").write_text("match attention every 2 -> reuse\n")
    assert parse("match attention every 2 -> reuse\n") == load("use mine.cp")
