"""What fuzzing starts from: the policies of this checkout, small ones first, and the words of the language."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from cachepolicy.errors import PolicyError
from cachepolicy.language import vocabulary
from cachepolicy.language.parser import parse

ROOT = Path(__file__).parents[1]
LARGEST = 8192
"""Bytes of a seed: the goldens about limits are megabytes."""

SIGNS = ("->", "<=", ">=", "==", "!=", "\n ", "\n", "#", '""', "''", "[", "]", "(", ")", "{", "}", "?", "%", "1e308")


def texts() -> Iterator[bytes]:
    """Every policy text of the checkout: shipped, conformance, goldens, and what the documents show."""
    for folder in ("policies", "tests/golden", "tests/conformance/parse", "tests/fuzz/parser"):
        yield from (path.read_bytes() for path in sorted((ROOT / folder).glob("*.cp")))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        fences = re.findall(r"^```cachepolicy\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        yield from (fence.encode() for fence in fences)


def forms() -> Iterator[bytes]:
    """Every policy of the checkout in its JSON form."""
    for folder in ("tests/golden", "tests/conformance/parse", "tests/fuzz/json_form"):
        yield from (path.read_bytes() for path in sorted((ROOT / folder).glob("*.json")))
    for text in texts():
        try:
            yield parse(text).model_dump_json(exclude_defaults=True).encode()
        except PolicyError:
            continue


def write(folder: Path, suffix: str) -> int:
    """Fill a folder with seeds, each under the hash of its content; how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = {seed for seed in (texts() if suffix == "cp" else forms()) if len(seed) <= LARGEST}
    for seed in seeds:
        (folder / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    return len(seeds)


def words(suffix: str) -> list[str]:
    """What is put into inputs as a whole: the words and signs of the language, the keys of the JSON form."""
    known = {*vocabulary.RESERVED, *vocabulary.CLOCK, *vocabulary.FUNCTIONS, *vocabulary.TYPES, *vocabulary.PREDICTORS}
    for table in (vocabulary.PREDICTORS, vocabulary.APPROXIMATIONS):
        known |= {label for labels in table.values() for label in labels}
    if suffix == "json":
        found = {word for form in forms() for word in re.findall(rb'"[a-z_]+"', form)}
        return sorted(word.decode() for word in found)
    return sorted(known | set(SIGNS))


def dictionary(suffix: str) -> str:
    """The words in libFuzzer's form, one quoted a line."""
    escaped = (word.encode("unicode_escape").decode().replace('"', '\\"') for word in words(suffix))
    # libFuzzer knows `\\xAB` and no `\\n`.
    return "".join(f'"{word}"\n'.replace("\\n", "\\x0A") for word in escaped)
