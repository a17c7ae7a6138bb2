"""Derives which output of a block continues which input from a forward on the meta device, without weights.

The forward runs on a copy of the root model whose tensors are on the meta device. The copy has no hooks and no policy.
What the forward cannot show (the value of a tensor decides, a method was replaced on the instance) stays unknown.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Attributes of models have arbitrary types, which pyright reports as unknown.

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cachepolicy.engine.block_chain import Chain, ChainForm, Keeps, bind_names
from cachepolicy.engine.chain_recording import Continuations, Recorder
from cachepolicy.engine.compile.graph_ops import UNCOMPILED
from cachepolicy.engine.distributed.groups import is_initialized
from cachepolicy.engine.history_packing import leaves
from cachepolicy.engine.hooks import parameters_of

Call = tuple[tuple[Any, ...], dict[str, Any]]


def forms_of(model: nn.Module, call: Call, spans: Mapping[int, Sequence[str]]) -> dict[int, ChainForm]:
    """Return the structure of spans of blocks, as far as a forward on the meta device shows it.

    The random state stays as it is, and no tensor of the model or of the call is read or written.

    Args:
        model: The root model.
        call: The arguments of one call of the root model.
        spans: The names of the blocks of each span, by site number.

    Returns:
        The structure of the spans that ran completely, by site number.
    """
    # With several processes, the forward might fail in one of them, and they have to decide alike.
    if is_initialized() or any(_replaced(module) for module in model.modules()):
        return {}
    state = torch.get_rng_state()
    try:
        with torch.inference_mode(mode=False), torch.no_grad(), UNCOMPILED:
            return _observed(*_on_meta(model, call), spans)
    except Exception:  # noqa: BLE001 (the model is foreign code, and the engine has another way)
        return {}
    finally:
        # Threads share the random state, so it is only written where the forward has drawn from it.
        if not torch.equal(state, torch.get_rng_state()):
            torch.set_rng_state(state)


def _replaced(module: nn.Module) -> bool:
    """Return True if foreign code has replaced the forward of this module, as offloading does."""
    return "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule)


def _on_meta(model: nn.Module, call: Call) -> tuple[nn.Module, Call]:
    """Return copies of the model, without hooks, and of the arguments, with all tensors on the meta device."""
    memo = dict[int, Any]()
    tensors = leaves(call)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, OrderedDict) and name.endswith(("_hooks", "_with_kwargs", "_always_called")):
                memo[id(value)] = OrderedDict()
            tensors += leaves(value)
    for tensor in tensors:
        memo[id(tensor)] = _weightless(tensor)
    return copy.deepcopy((model, call), memo)


def _weightless(tensor: torch.Tensor) -> torch.Tensor:
    bare = tensor.detach().to("meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def _observed(model: nn.Module, call: Call, spans: Mapping[int, Sequence[str]]) -> dict[int, ChainForm]:
    """Run the model and record the blocks of the spans."""
    continuations = Continuations()
    chains = {span: Chain() for span in spans}
    forms = dict[int, ChainForm]()
    for _ in range(_MOST_TRIES):
        recorders = {
            span: Recorder(chains[span], continuations, spans[span], Keeps(1, residuals=False, outputs=False, step=0))
            for span in spans
            if span not in forms
        }
        handles = [
            handle
            for span, recorder in recorders.items()
            for position, name in enumerate(spans[span])
            for handle in _watched(model.get_submodule(name), recorder, position)
        ]
        model(*call[0], **call[1])
        for handle in handles:
            handle.remove()
        for span, recorder in recorders.items():
            blocks = len(spans[span])
            if recorder.calls == blocks and recorder.finish() is None:
                form = chains[span].form(blocks)
                if form is not None:
                    forms[span] = form
        if len(forms) == len(spans):
            break
    return forms


_MOST_TRIES = 3  # a forward shows which blocks write into their inputs, and a later one reckons with it


def _watched(module: nn.Module, recorder: Recorder, position: int) -> list[Any]:
    """Let a recorder see the calls of a block."""
    parameters, begun = parameters_of(module), list[Any]()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = bind_names(parameters, args, kwargs)
        begun.append((names, recorder.begin(position, names)))

    def after(block: nn.Module, _: tuple[Any, ...], __: dict[str, Any], output: Any) -> None:
        names, inputs = begun.pop()
        recorder.end(position, block, names, inputs, output)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
