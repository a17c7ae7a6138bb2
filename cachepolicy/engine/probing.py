"""The probes of one root call: which tensors of a module call they read, and which output continues which input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch

from cachepolicy.diffusers.argument_names import STREAMS
from cachepolicy.engine.actions import versions
from cachepolicy.engine.block_chain import Names, parts
from cachepolicy.engine.hooks import SiteHandle
from cachepolicy.engine.ledger import Ledger
from cachepolicy.engine.signals import Measuring
from cachepolicy.engine.step_context import StepContext
from cachepolicy.language import ir


class Probing:
    """Reads the probes of one root call, and learns from tensor identity how blocks continue.

    Attributes:
        again: Whether a probe was passed twice after a site had been answered because of it.
    """

    __slots__ = ("_begun", "_context", "_last", "_ledger", "_unclear", "again")

    def __init__(self, context: StepContext, ledger: Ledger) -> None:
        self._context = context
        self._ledger = ledger
        self._begun: dict[ir.Probe, tuple[Names, int | None]] | None = None
        self._unclear: list[Any] = []
        """The arguments of `_see` for ambiguous outputs, with their `_version` counters."""
        self._last: tuple[Any, Names, Any] | None = None
        self.again = False

    def has_all(self, probes: Iterable[ir.Probe]) -> bool:
        """Return True once all these probes were read."""
        measuring = self._ledger.measuring
        return measuring is not None and all(map(measuring.has, probes))

    # --- how blocks continue -----------------------------------------------------------------------------

    def ran(self, module: Any, names: Names, output: Any) -> None:
        """Remember the module that has just run, unless it is known how its class continues."""
        known = type(module) in self._context.root.continuations.settled
        self._last = (module, names, output) if not known and isinstance(output, torch.Tensor | tuple) else None

    def forget(self) -> None:
        """Forget the module that ran before: it says nothing about the next one."""
        self._last = None

    def learn(self, names: Names) -> None:
        """Learn which input of a module continues which output of the module before it, by tensor identity."""
        if self._last is None:
            return
        module, before, output = self._last
        self._last = None
        continuations, all_found = self._context.root.continuations, True
        for index, part in enumerate(parts(output)[0]):
            if not isinstance(part, torch.Tensor):
                continue
            found = [name for name, value in names.items() if value is part and name in before]
            all_found &= bool(found)
            for name in found:
                continuations.learn(module, index, name)
        if all_found:
            continuations.settled.add(type(module))  # pyright: ignore[reportUnknownArgumentType]

    # --- module calls ------------------------------------------------------------------------------------

    def enter(self, site: SiteHandle, names: Names) -> bool:
        """Read the inputs of a module. Return True if a probe may have been read."""
        if self._ledger.measuring is None or not (site.starts or site.inputs):
            return False
        begun = self._begun = {} if self._begun is None else self._begun
        for probe in site.starts:
            if probe in begun:
                self._remeasures(probe)
            begun[probe] = (names, counter(names))
        for probe in site.inputs:
            tensor = _probed(probe, names)
            if tensor is not None:
                self._sees(self._ledger.measuring, probe, tensor)
        return bool(site.inputs)

    def leave(self, site: SiteHandle, module: Any, names: Names, output: Any, before: int | None) -> bool:
        """Read the outputs of a module. Return True if a probe may have been read."""
        measuring = self._ledger.measuring
        if measuring is None or not site.outputs:
            return False
        for probe in site.outputs:
            # The residual of a span is relative to the input of its first block.
            first, count = self._begun.get(probe, (names, before)) if self._begun else (names, before)
            self._see(measuring, probe, module, first, output, count, last=False)
        return True

    def finish(self, measuring: Measuring) -> None:
        """Read the outputs that were ambiguous when their modules ran."""
        for seen, written in self._unclear:
            self._see(measuring, *seen, last=True, unwritten=versions(seen[3]) == written)

    def _see(
        self, measuring: Measuring, probe: ir.Probe, module: Any, names: Names, output: Any, count: int | None,
        *, last: bool, unwritten: bool = True,
    ) -> None:  # fmt: skip
        """Pass the hidden states of an output to a probe. Ambiguous outputs are resolved at the end of the call.

        Args:
            measuring: The signals of the call.
            probe: The probe.
            module: The module that has run.
            names: Its inputs by name.
            output: Its output.
            count: The `_version` of its hidden states before it ran.
            last: Whether the call has ended.
            unwritten: Whether nothing has written into the output.
        """
        outputs = cast("Sequence[Any]", output) if type(output) is tuple else parts(output)[0]
        target = _target(names)
        before = None if target is None else names[target]
        places = [index for index, part in enumerate(outputs) if isinstance(part, torch.Tensor)]
        alike = places if before is None else [index for index in places if outputs[index].shape == before.shape]
        if before is not None and len(alike) > 1:
            continuations = self._context.root.continuations
            known = [index for index in alike if continuations.input_of(module, index) == target]
            if len(known) != 1 and not last:
                self._unclear.append(((probe, module, names, output, count), versions(output)))
                return
            alike = known or alike
        if not places:
            return
        stream = outputs[(alike or places)[0]]
        if probe.stream == "output":
            self._sees(measuring, probe, stream)
            return
        # The residual of what was written into meanwhile is not known.
        unwritten = unwritten and before is not None and (count is None or before._version == count)
        if before is not None and unwritten and before.shape == stream.shape:
            self._sees(measuring, probe, stream - before, shared=False)

    def _sees(self, measuring: Measuring, probe: ir.Probe, tensor: torch.Tensor, *, shared: bool = True) -> None:
        if measuring.has(probe):
            self._remeasures(probe)
        else:
            measuring.see(probe, tensor, shared=shared)

    def _remeasures(self, probe: ir.Probe) -> None:
        """Mark a probe that one forward pass passes more than once. Signals that read it are undefined.

        If a site has been answered because of a signal, the forward pass runs again.
        """
        self._context.root.remeasured.add(probe)
        self.again |= any(self._ledger.of(site).verdict == "reuse" for site in self._ledger.signals)


def counter(names: Names) -> int | None:
    """Return the `_version` of the input hidden states, or None if they have none."""
    states = names.get(_target(names) or "")
    return states._version if isinstance(states, torch.Tensor) and not states.is_inference() else None


def _target(names: Names) -> str | None:
    """Return the name of the input that carries the hidden states."""
    for name in (*STREAMS, *names):
        if isinstance(names.get(name), torch.Tensor):
            return name
    return None


def _probed(probe: ir.Probe, names: Names) -> torch.Tensor | None:
    """Return the tensor that an `input` or `argument` probe reads, or None if the call does not have it."""
    name = probe.argument if probe.stream == "argument" else _target(names)
    value = names.get(name or "")
    return value if isinstance(value, torch.Tensor) else None
