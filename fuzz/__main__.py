"""Fuzz a target for some minutes, guided by coverage: `python -m fuzz parser --minutes 10`. Needs atheris.

What is found stays in `--folder`: inputs that reached something new, and under `crashes` those that went wrong.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import atheris

TARGETS = ("parser", "json_form")
SECONDS = 20
"""An input that takes longer is a finding. Instrumented code is some ten times slower than it else is."""
MEGABYTES = 2048


def main() -> None:
    """Set the fuzzer up, and leave the process to it."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target", choices=TARGETS)
    options.add_argument("--minutes", type=float, default=10)
    options.add_argument("--seed", type=int, default=0, help="of the fuzzer's dice; 0 takes another each time")
    options.add_argument("--largest", type=int, default=4096, help="bytes of an input")
    options.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="where the corpus is kept")
    chosen = options.parse_args()
    with atheris.instrument_imports(include=["cachepolicy", "fuzz", "lark"]):
        target = importlib.import_module(f"fuzz.{chosen.target}")
        corpus = importlib.import_module("fuzz.corpus")
    folder = chosen.folder / chosen.target
    seeds = corpus.write(folder / "seeds", target.SUFFIX)
    for name in ("corpus", "crashes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    words = folder / "words.dict"
    words.write_text(corpus.dictionary(target.SUFFIX), "ascii")
    print(f"{seeds} seeds, {len(words.read_text('ascii').splitlines())} words", flush=True)
    arguments = [
        sys.argv[0],
        f"-max_total_time={round(chosen.minutes * 60)}",
        f"-max_len={chosen.largest}",
        f"-seed={chosen.seed}",
        f"-timeout={SECONDS}",
        f"-rss_limit_mb={MEGABYTES}",
        f"-dict={words}",
        f"-artifact_prefix={folder / 'crashes'}/",
        "-print_final_stats=1",
        str(folder / "corpus"),
        str(folder / "seeds"),
    ]
    atheris.Setup(arguments, target.hold, **_mutator(target))
    atheris.Fuzz()


def _mutator(target: Any) -> dict[str, Any]:
    """The target's own way to change an input, taking turns with the fuzzer's."""
    own = getattr(target, "mutate", None)
    if own is None:
        return {}

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        changed = own(data, seed) if seed % 2 else None
        return changed if changed is not None and len(changed) <= most else atheris.Mutate(data, most)

    return {"custom_mutator": mutate}


if __name__ == "__main__":
    main()
