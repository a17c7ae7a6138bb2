"""The compiled regions of a model: the whole root model or single blocks, and the state of their graphs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo

from cachepolicy.engine.actions import ANSWER, REUSE, chain_of
from cachepolicy.engine.call_arguments import CallArguments
from cachepolicy.engine.compile.graph_io import autocast, commit, problem, staged
from cachepolicy.engine.compile.graph_ops import Stage
from cachepolicy.engine.execution_plan import ExecutionPlan
from cachepolicy.engine.hooks import SiteHandle, parameters_of
from cachepolicy.engine.meta_forward import forms_of
from cachepolicy.engine.refusals import warn_of_compilers
from cachepolicy.planning.facts import Fact

if TYPE_CHECKING:
    from cachepolicy.engine.forward_pass import ForwardPass
    from cachepolicy.engine.root_model import RootModel


class Graphs:
    """The graphs of one root model: its compiled blocks, and the structure of its spans.

    Calls outside graphs show the structure. `surprised` is set if a site ran in an unexpected graph.
    """

    def __init__(self, host: RootModel) -> None:
        self.host = host
        self.surprised = False
        self._prepared = False
        self._learnt: dict[Any, int] = {}
        self._shows = bool(host.execution.plan.probes) or any(keeping.streams for keeping in host.execution.keepings)
        self._blocks: list[Sequence[int]] = []
        self._signatures: set[Any] = set()
        self._warned = False
        self._around = list(self._candidates())
        self._deriving = threading.Lock()
        self.derives = True
        """Whether the structure of skipped spans has not been derived yet."""

    def _candidates(self) -> Iterator[str]:
        """Yield the modules that contain sites, outermost first. Their graphs would contain these sites."""
        ancestors = dict[str, None]()
        for site in self.host.execution.plan.sites:
            for name in site.modules:
                steps = name.split(".")
                ancestors |= dict.fromkeys(".".join(steps[:length]) for length in range(1, len(steps)))
        for name in sorted(ancestors, key=lambda name: name.count(".")):
            if not isinstance(self.host.module.get_submodule(name), torch.nn.ModuleList | torch.nn.ModuleDict):
                yield name

    def look(self) -> None:
        """Find blocks that are compiled alone. Blocks may be compiled after the last trajectory."""
        for name in list(self._around):
            module = self.host.module.get_submodule(name)
            if is_compiled(module):
                self._around = [around for around in self._around if not f"{around}.".startswith(f"{name}.")]
                self._add(name, module)

    def _add(self, name: str, module: torch.nn.Module) -> None:
        numbers = [
            site.index
            for site in self.host.execution.plan.sites
            if all(member.startswith(f"{name}.") for member in site.modules)
        ]
        within = {number: index for index, number in enumerate(numbers)}
        for inner, site in self.host.handles.items():
            if inner.startswith(f"{name}."):
                site.within = within.get(site.index, -1)
                site.inside = [(within[span], position) for span, position in site.members if span in within]
        handle = self.host.handles.get(name)
        if handle is None:
            handle = self.host.handles[name] = SiteHandle(self.host, name, parameters_of(module))
            handle.block, handle.special = len(self._blocks), True
            self.host.placement.add(name, handle)
        handle.block, handle.special = len(self._blocks), True
        self._blocks.append(numbers)

    # --- one call ----------------------------------------------------------------------------------------

    def used(self, *, whole: bool) -> bool:
        """Return True if this call runs in graphs."""
        return whole or self.surprised or bool(self._blocks)

    def learns(self, arguments: CallArguments) -> bool:
        """Return True if the call has to run outside graphs to learn the structure of its spans."""
        return self._shows and self._learnt.get(_kind(arguments), 0) >= 0

    def learnt(self, call: ForwardPass) -> None:
        """Record the structure of the spans after a call outside graphs."""
        spans = [site for site, keeping in enumerate(self.host.execution.keepings) if keeping.streams]
        for site in spans:
            chain_of(call.slots[site]).autocast = autocast()
        known = self.host.continuations.forms.keys() >= set(spans)
        kind = _kind(call.arguments)
        tries = self._learnt.get(kind, 0) + 1
        self._learnt[kind] = -1 if known or tries >= _MOST_TRIES else tries

    def derive(self, execution: ExecutionPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Derive once what the spans with a `skip` return, so that they need no compute to show it."""
        with self._deriving:
            if self.derives:
                derived = forms_of(self.host.module, (args, kwargs), execution.skipped)
                self.host.continuations.forms |= derived
                self.derives = False

    def prepare(self, call: ForwardPass, *, whole: bool) -> None:
        """Build what the graphs read, and attach it to the call. A site whose history cannot answer computes."""
        if not self._prepared:
            self._prepared = True
            warn_of_compilers(self.host)
        everything = whole or self.surprised
        sites = range(len(call.slots)) if everything else [number for block in self._blocks for number in block]
        while problems := self._problems(call, sites):
            for site, reason in problems.items():
                call.ledger.refuse(site, reason)
            call.ledger.plan()
        call.parts = parts = {site: staged(call, site) for site in sites}
        decided = tuple((part.code, part.answer, len(part.history)) for part in parts.values())
        modes = torch.is_grad_enabled(), call.inference, autocast()
        self._count((decided, call.halved, modes, call.arguments.signature()))
        if everything:
            call.stage = Stage([parts[site] for site in range(len(parts))])
        call.blocks = [Stage([parts[site] for site in block]) for block in self._blocks]

    def _problems(self, call: ForwardPass, sites: Iterable[int]) -> dict[int, str]:
        """Return why sites that are decided to reuse cannot answer."""
        decided = {site: call.ledger.of(site) for site in sites}
        found = {site: problem(call, site, one.action) for site, one in decided.items() if one.verdict == "reuse"}
        return {site: reason for site, reason in found.items() if reason is not None}

    def _count(self, signature: Any) -> None:
        """Raise torch's recompile limit as needed.

        Each set of decisions is a separate graph for each size of the inputs.
        """
        self._signatures.add(signature)
        wanted = len(self._signatures) + _MARGIN
        config: Any = torch._dynamo.config  # noqa: SLF001
        if wanted <= getattr(config, _LIMIT):
            return
        if wanted <= MOST_GRAPHS:
            setattr(config, _LIMIT, wanted)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"there are more than {MOST_GRAPHS} sets of decisions and sizes of inputs, each a graph of its own: "
                "torch will stop compiling and run the rest as it is",
                UserWarning,
                stacklevel=2,
            )

    def look_for_repeats(self, call: ForwardPass) -> None:
        """Mark the sites that graphs have called more than once."""
        for site, part in call.parts.items():
            if part.repeats:
                call.repeats(site, answered=part.code is REUSE or part.code is ANSWER)

    def end(self, call: ForwardPass) -> None:
        """Commit what the graphs left."""
        for site, part in call.parts.items():
            if part.repeats:
                continue
            if part.unfit:
                call.ledger.refuse(site, Fact.MISFIT)
            commit(call, site, part)


_MOST_TRIES = 3  # calls after which an unlearned span breaks the graph instead
_MARGIN = 4  # reserve for recompiles of one code object by dtype, shape or gradient mode
MOST_GRAPHS = 64
"""The largest recompile limit that the engine sets."""


_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # noqa: SLF001


def _kind(arguments: CallArguments) -> Any:
    """Return which arguments are tensors and their dtypes. Calls of one kind run alike."""
    return tuple((name, dtype) for name, _, dtype, _ in arguments.signature())


def is_compiled(module: torch.nn.Module) -> bool:
    """Return True if the module's own forward is compiled."""
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__name__ == "OptimizedModule"
        or hasattr(module.forward, "_torchdynamo_orig_callable")
    )
