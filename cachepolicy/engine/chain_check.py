"""Fast check of a repeated span compute: verifies the known structure instead of recording it again."""

from __future__ import annotations

from typing import Any

import torch

from cachepolicy.engine.block_chain import Chain, ChainEntry, Keeps, Link, Names, parts, signature


def is_trackable(chain: Chain, blocks: int, names: Names) -> bool:
    """Return True if the chain has a full compute on inputs of this signature, without in-place writes.

    Args:
        chain: The history of the span.
        blocks: The number of blocks of the span.
        names: The inputs of the first block by name.
    """
    return (
        len(chain.links) == blocks
        and bool(chain.history)
        and not (chain.clones or chain.splits)
        and not torch.is_inference_mode_enabled()
        and not any(map(_is_uncounted, names.values()))
        and chain.signature == signature(names)
    )


class Tracker:
    """Tracks a compute of a span that has computed before on the same branch.

    Each block must receive the outputs of the previous block as before, unmodified. Otherwise nothing is stored, and
    the next compute uses `Recorder`. The tracker does not check whether inner outputs are used elsewhere.

    Attributes:
        calls: The number of blocks that have run.
    """

    __slots__ = (
        "_bases", "_chain", "_entries", "_keeps", "_last", "_number", "_spoilt", "_versions", "_written", "calls",
    )  # fmt: skip

    def __init__(self, chain: Chain, keeps: Keeps, blocks: int) -> None:
        self._chain = chain
        self._keeps = keeps
        self._number = blocks
        self.calls = 0
        self._spoilt = False
        self._last: list[Any] = []
        self._versions: list[int] = []
        self._bases: list[Any] = []
        self._written: list[int] = []
        self._entries: list[ChainEntry] = []

    def begin(self, position: int, names: Names) -> None:
        """Check the inputs of a block that is about to run."""
        link = self._chain.links[position]
        if position != self.calls:
            self._spoilt = True
        elif link.leads:
            self._bases = [None if source is None else names.get(source) for source in link.shape.inputs]
            self._written = _versions(self._bases)
            # Inference tensors have no `_version`, so in-place writes cannot be detected.
            self._spoilt |= any(map(_is_uncounted, self._bases))
        else:
            for index, name in link.takes:
                if index >= len(self._last) or names.get(name) is not self._last[index]:
                    self._spoilt = True

    def end(self, position: int, output: Any) -> None:
        """Check the output of a block."""
        self.calls += 1
        link = self._chain.links[position]
        outputs = [output] if isinstance(output, torch.Tensor) else parts(output)[0]
        if type(output) is not link.shape.kind or len(outputs) != len(link.shape.inputs):  # pyright: ignore[reportUnknownArgumentType]
            self._spoilt = True
        if not link.leads and _versions(self._last) != self._versions:
            self._spoilt = True
        self._last, self._versions = outputs, _versions(outputs)
        if position in self._chain.endings and not self._spoilt:
            self._close(position, link)

    def _close(self, position: int, link: Link) -> None:
        ending = self._chain.endings[position]
        if _versions(self._bases) != self._written or ending.segment != link.segment:
            self._spoilt = True
            return
        last = self._last
        self._entries.append(self._keeps.entry(self._bases, [None if i is None else last[i] for i in ending.outputs]))

    def finish(self) -> None:
        """Store the entries of the completed span, or reset the chain if a check failed."""
        chain = self._chain
        if self._spoilt or self.calls != self._number or len(self._entries) != len(chain.history):
            chain.forget()
        else:
            chain.put(self._entries, self._keeps.depth)


def _versions(values: list[Any]) -> list[int]:
    return [-1 if not isinstance(value, torch.Tensor) or value.is_inference() else value._version for value in values]


def _is_uncounted(value: Any) -> bool:
    """Return True for an inference tensor, which has no `_version` outside inference mode either."""
    return isinstance(value, torch.Tensor) and value.is_inference()
