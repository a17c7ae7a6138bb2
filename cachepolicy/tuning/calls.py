"""The calls of a pipeline that are recorded and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls of a pipeline that differ in their prompts and seeds.

    Attributes:
        arguments: Arguments of every call.
        prompts: One for each call in turn; empty for a pipeline that gets none.
        samples: Number of calls that are recorded.
        held_out: Number of further calls, on which the result is measured.
        seed: Seed of the first call; each further one has the next.
    """

    arguments: Mapping[str, Any]
    prompts: Sequence[str]
    samples: int
    held_out: int
    seed: int

    def split(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return the calls that are recorded and the further ones."""
        calls = [self._call(number) for number in range(self.samples + self.held_out)]
        return calls[: self.samples], calls[self.samples :]

    def _call(self, number: int) -> dict[str, Any]:
        prompt = {"prompt": self.prompts[number % len(self.prompts)]} if self.prompts else {}
        generator = torch.Generator("cpu").manual_seed(self.seed + number)
        return {**self.arguments, **prompt, "generator": generator}
