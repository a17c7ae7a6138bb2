"""Presets: which one fits a model, what it sets, and what is refused; and used policies that are narrowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from cachepolicy.errors import PolicyError
from cachepolicy.language.formatter import format
from cachepolicy.language.linker import load, resolve
from cachepolicy.language.parser import parse, recover
from cachepolicy.language.presets import ModelFacts
from cachepolicy.planning.simulation import simulate

POLICY = parse("""param interval: int
param skipped: int = 1
preset small for class "^Small" with interval = 2
preset wide for class "Trans" when width >= 512 and depth in {4, 8} and kind == "a" with interval = 3, skipped = 2
preset gated for class "Trans" when gated and not (width >= 512) with interval = 4
match attention when step >= skipped every interval -> reuse
""")


def model(name: str = "BigTransformer", width: int | None = 512, depth: int = 8, **config: object) -> ModelFacts:
    return ModelFacts(name, width, depth, tuple(config.items()))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("facts", "preset", "settings"),
    [
        (model("SmallModel"), "small", {"interval": 2, "skipped": 1}),
        (model(kind="a"), "wide", {"interval": 3, "skipped": 2}),
        (model(kind="a", depth=4, width=1024), "wide", {"interval": 3, "skipped": 2}),
        (model(width=64, gated=True), "gated", {"interval": 4, "skipped": 1}),
    ],
)
def test_the_preset_that_fits_sets_params(facts: ModelFacts, preset: str, settings: dict[str, int]) -> None:
    """By class, width, depth and entries of the configuration; other params keep their defaults."""
    resolved = resolve(POLICY, model=facts)
    assert (preset, settings) == (resolved.preset, resolved.settings)
    assert resolved.digest == resolve(POLICY, {**settings, "preset": "small"}).digest


@pytest.mark.parametrize(
    "facts",
    [
        model("TooSmall"),
        model(),
        model(kind="b"),
        model(kind="a", depth=5),
        model(kind="a", width=None),
        model(width=64),
    ],
)
def test_no_preset_fits(facts: ModelFacts) -> None:
    """A missing or other entry does not fit; the error lists the presets, and a value makes it unnecessary."""
    with pytest.raises(PolicyError) as caught:
        resolve(POLICY, model=facts)
    (finding,) = caught.value.diagnostics
    assert "E166" == finding.code
    assert "small for class" in str(finding.help)
    resolved = resolve(POLICY, {"interval": 5}, model=facts)
    assert (None, 5) == (resolved.preset, resolved.settings["interval"])


def test_an_explicit_param_overrides_one_value() -> None:
    """The other values of the preset stay."""
    resolved = resolve(POLICY, {"interval": 7}, model=model(kind="a"))
    assert {"interval": 7, "skipped": 2} == resolved.settings


def test_several_presets_that_fit_are_an_error() -> None:
    """Unless one is chosen, or all that they set is given."""
    text = format(POLICY) + '\npreset other for class "^Small" with skipped = 3\n'
    policy, facts = parse(text), model("SmallModel")
    with pytest.raises(PolicyError, match=r"E167.*`small`, `other`"):
        resolve(policy, model=facts)
    assert 2 == resolve(policy, {"preset": "small"}, model=facts).settings["interval"]
    assert {"interval": 9, "skipped": 9} == resolve(policy, {"interval": 9, "skipped": 9}, model=facts).settings


@pytest.mark.parametrize("chosen", ["nothing", 3])
def test_an_unknown_preset_is_an_error(chosen: object) -> None:
    """The nearest name is offered."""
    with pytest.raises(PolicyError, match=r"E167|E161"):
        resolve(POLICY, {"preset": chosen}, model=model())


def test_a_param_may_be_called_preset() -> None:
    """Then `preset=` sets it."""
    policy = parse(
        'param preset: int = 3\npreset a for class "A" with preset = 4\nmatch attention every preset -> reuse\n'
    )
    assert {"preset": 5} == resolve(policy, {"preset": 5}, model=model("B")).settings


def test_without_a_model_the_first_preset_sets_params_without_a_default() -> None:
    """Params with a default keep it."""
    resolved = resolve(POLICY)
    assert (None, {"interval": 2, "skipped": 1}) == (resolved.preset, resolved.settings)


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ('preset p for class "(" with interval = 3', "E017"),
        ('preset p for class "A" with nothing = 3', "E101"),
        ('preset p for class "A" with interval = "x"', "E161"),
        ('preset p for class "A" with interval = 3, interval = 4', "E102"),
        ('preset p for class "A" when l1(x) > 3 with interval = 3', "E113"),
        ('preset p for class "A" when sum(x) > 3 with interval = 3', "E113"),
        ('preset small for class "A" with interval = 3', "E102"),
        ('preset p for class "A"', "E004"),
        ("preset p with interval = 3", "E001"),
        ("use fora when l1(x) > 3", "E105"),
        ("use fora when drift > 3", "E101"),
        ("use fora at most 2.5 in a row", "E124"),
        ("use fora at most 3 in all", "E001"),
    ],
)
def test_what_a_preset_and_a_use_may_say(line: str, code: str) -> None:
    """Faults are found without a model."""
    findings = recover(format(POLICY) + line.replace("l1(x)", "l9(x)" if "use" in line else "l1(x)") + "\n")[1]
    assert [code] == [each.code for each in findings if each.severity == "error"]


def rows(tmp_path: Path, part: str, whole: str, steps: int = 8) -> str:
    (tmp_path / "part.cp").write_text(part)
    (tmp_path / "whole.cp").write_text(whole)
    return simulate(tmp_path / "whole.cp", steps=steps).rows["transformer_blocks.0.attn1"]


def test_when_narrows_a_used_policy(tmp_path: Path) -> None:
    """Outside the condition its rules do not own the site, so that later rules do."""
    whole = "param from_: int = 3\nuse 'part.cp' when step >= from_\nmatch attention on {0, 2} -> reuse\n"
    assert "CRCRRRRC" == rows(tmp_path, "match attention when step < 7 -> reuse\nmatch attention -> compute\n", whole)


def test_a_condition_that_always_holds_does_not_narrow(tmp_path: Path) -> None:
    """A used policy means what it means without a condition that holds at every step."""
    (tmp_path / "part.cp").write_text("match attention when t > 3 every 2 -> reuse\n")
    digests = list[str]()
    for condition in ("", "when step >= 0", "when progress in [0, 1]"):
        (tmp_path / "whole.cp").write_text(f"use 'part.cp' {condition}\n")
        digests.append(resolve(load(tmp_path / "whole.cp")).digest)
    assert 1 == len(set(digests))


@pytest.mark.parametrize(
    ("bound", "row"),
    [
        ("", "CRRRCRRR"),
        ("at most 3 in a row", "CRRRCRRR"),
        ("at most 2 in a row", "CRRCRRCR"),
        ("at most off in a row", "CRRRCRRR"),
        ("at most 1 + step / 4 in a row", "CRCRRCRR"),
    ],
)
def test_a_bound_of_a_used_policy_is_the_smaller_of_both(tmp_path: Path, bound: str, row: str) -> None:
    """The rule's own bound is three."""
    part = "match attention at most 3 in a row at most 99 in all -> reuse\nmatch feedforward -> compute\n"
    assert row == rows(tmp_path, part, f"use 'part.cp' {bound}\n")
    if bound:
        assert (
            row == rows(tmp_path, part.replace("at most 3 in a row ", ""), f"use 'part.cp' {bound}\n") or "off" in bound
        )


def test_presets_of_a_used_policy_fit_the_model_too(tmp_path: Path) -> None:
    """Its user may set single params."""
    (tmp_path / "part.cp").write_text(format(POLICY))
    (tmp_path / "whole.cp").write_text("use 'part.cp' with skipped = 4\n")
    resolved = resolve(
        parse("use 'part.cp'\n").model_copy(update={"source_name": str(tmp_path / "whole.cp")}), model=model(kind="a")
    )
    assert "every 3" in format(resolved.policy.model_copy(update={"statements": resolved.rules}))
