"""Policies for models with two lists of blocks decide for each list what the transcription does for one."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tests.methods import transcriptions as reference  # noqa: E402
from tests.methods.scripted import Block, Scripted, letters, run  # noqa: E402
from tests.methods.test_policies import SEEDS, Draw, Stream, totals, zeros  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the policy reused nothing"),
    pytest.mark.filterwarnings("ignore:the policy can never"),
]


class TwoLists(Scripted):
    """A scripted model with as many blocks in a second list, whose residuals are the second half of those given."""

    def __init__(self, residuals: list[Stream]) -> None:
        half = len(residuals) // 2
        super().__init__(residuals[:half])
        self.single_transformer_blocks = nn.ModuleList(Block(stream, None) for stream in residuals[half:])

    def forward(self, hidden_states: Tensor, timestep: Any) -> Tensor:
        hidden_states = super().forward(hidden_states, timestep)
        for block in self.single_transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@given(SEEDS)
def test_double_fbc(seed: int) -> None:
    """Each list has a first block, a threshold and a decision of its own."""
    draw = Draw(seed)
    streams = [draw.stream() for _ in range(4)]
    multi, single = draw.random.uniform(0.01, 0.4), draw.random.uniform(0.01, 0.4)
    rows, _ = run(TwoLists(streams), "double_fbc", zeros(draw.steps), multi=multi, single=single)
    expected = [reference.dbcache(streams[0], multi, warmup=0), reference.dbcache(streams[2], single, warmup=0)]
    assert [letters(each) for each in expected] == list(rows.values())


@given(SEEDS)
def test_double_dbcache(seed: int) -> None:
    """Each list has first blocks, bounds and a decision of its own; the mask holds for both."""
    draw = Draw(seed)
    streams = [draw.stream() for _ in range(8)]
    warmup, threshold = draw.random.randint(0, 6), draw.random.uniform(0.01, 0.4)
    streak, most = draw.random.choice([None, 1, 3]), draw.random.choice([None, 2, 5])
    mask = draw.random.choice([None, "".join(draw.random.choice("01") for _ in range(draw.steps))])
    expected = [
        reference.dbcache(
            totals(*streams[start : start + 2]),
            threshold,
            warmup=warmup,
            streak=-1 if streak is None else streak,
            most=-1 if most is None else most,
            mask=mask,
        )
        for start in (0, 4)
    ]
    settings = {"warmup": warmup, "threshold": threshold, "streak": streak, "most": most, "steps_mask": mask}
    rows, _ = run(TwoLists(streams), "double_dbcache", zeros(draw.steps), first=2, end=-1, **settings)
    assert [letters(each) for each in expected] == list(rows.values())
