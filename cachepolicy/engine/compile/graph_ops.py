"""Site calls while Dynamo traces them.

A graph reads the parts that the root model prepared before the call, and leaves each result in a place of its own.
`graph_io` updates all other state outside the graph, so one graph serves every call with the same codes at any step. No
object is written twice in a graph: Dynamo (2.13 at least) loses the second store if a higher-order operation is in
between.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cachepolicy.engine.actions import (
    ANSWER,
    COMPUTE,
    PENDING,
    REUSE,
    STORE,
    Op,
    cloned,
    hidden_states,
    rebuilt_containers,
)
from cachepolicy.engine.answers import output_of, values_of
from cachepolicy.engine.block_chain import ChainForm, Names, bind_names, fed_back, led, parts, passed, rebuilt, results
from cachepolicy.engine.history_packing import leaves


class _Uncompiled:
    """Context manager that runs compiled modules in eager mode. It has no effect before torch 2.6.

    `torch.compiler.set_stance` is global for all threads: the first thread to enter sets it, the last to leave resets
    it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        make: Any = getattr(torch.compiler, "set_stance", None)
        with self._lock:
            self._inside += 1
            if self._inside == 1 and make is not None:
                self._stance = make("force_eager")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


UNCOMPILED = _Uncompiled()


@dataclass(slots=True, eq=False)
class OutputPlace:
    """Destination of one result of a graph, with the shape, dtype and device of its hidden states."""

    value: Any = None
    states: Any = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Kind of an answer: from the input alone, or a stored residual or output, unchanged or predicted."""

    skips: bool = False
    residual: bool = False
    predicts: bool = False
    feedback: bool = False


@dataclass(slots=True, eq=False)
class Part:
    """Data of one site in a graph: its inputs, set before the call, and its results.

    Attributes:
        history: The stored outputs that an answer reads, newest first. For a span, one history per segment and stream.
        weights: The coefficients of a prediction. For a span, one set per segment.
        places: Where results are left. For a span, one place per segment.
        calls: One place per module of the site, filled by its first call. Each is written once in a graph.
        residuals: Whether a compute leaves residuals.
        outputs: Whether a compute leaves outputs.
        clones: Whether answers are copied.
        square: Whether the hidden states had the shape of the output.
        unfit: Set by the graph if the history did not fit the call.
        repeats: Set by the graph if the site was called again.
    """

    code: Op = COMPUTE
    answer: Answer = Answer()
    history: Any = ()
    weights: Any = None
    form: ChainForm | None = None
    places: Sequence[OutputPlace] = ()
    bases: Sequence[OutputPlace] = ()
    calls: Sequence[OutputPlace] = ()
    residuals: bool = False
    outputs: bool = True
    clones: bool = False
    square: bool = False
    unfit: bool = False
    repeats: bool = False


@dataclass(slots=True, eq=False)
class Stage:
    """The parts of the sites in one graph: of the root model, or of one block that is compiled alone."""

    parts: Sequence[Part]


tracing = torch.compiler.is_dynamo_compiling
"""True while Dynamo traces. Dynamo replaces the call by a constant."""


def _says_exporting() -> bool:
    return bool(getattr(torch.compiler, "_is_compiling_flag", False))


exporting = getattr(torch.compiler, "is_exporting", _says_exporting)
"""True inside `torch.export`. Older versions of torch set another flag, and only there."""


def waits(stage: Stage, number: int, members: Sequence[tuple[int, int]]) -> bool:
    """Return True if a call has to leave the graph, because its decision or its structure is unknown.

    Args:
        stage: The parts that the graph can read.
        number: The number of the site's own part, or -1.
        members: The spans of the module, and its position in each.
    """
    for span, _ in members:
        if stage.parts[span].code is PENDING:
            return True
    return number >= 0 and stage.parts[number].code is PENDING


def call_in_graph(
    original: Any,
    module: Any,
    stage: Stage,
    number: int,
    members: Sequence[tuple[int, int]],
    parameters: Sequence[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a site call inside a graph.

    Args:
        original: The original `__call__`.
        module: The module.
        stage: The parts that the graph can read.
        number: The number of the site's own part, or -1.
        members: The spans of the module, and its position in each.
        parameters: The parameter names of the module's forward.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
    """
    names: Names = bind_names(parameters, args, kwargs) if members else {}
    for span, position in members:
        part = stage.parts[span]
        if _repeats(part, position):
            continue
        if (part.code is ANSWER or part.code is REUSE) and not part.unfit:
            if _suits(part, position, names):
                return _linked(part, position, names)
            part.unfit = True
        elif part.code is STORE:
            _begin(part, position, names)
    output = _computed(original, module, None if number < 0 else stage.parts[number], args, kwargs)
    for span, position in members:
        part = stage.parts[span]
        if part.code is STORE and not part.repeats:
            _end(part, position, output)
    return output


def _repeats(part: Part, position: int) -> bool:
    """Return True, and mark the part, if a module of the site is called again. The call then computes."""
    if part.repeats:
        return True
    call_place = part.calls[position]
    if call_place.value is None:
        call_place.value = True
        return False
    part.repeats = True
    return True


# --- modules with a history of their own -----------------------------------------------------------------


def _computed(original: Any, module: Any, part: Part | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if part is None or part.form is not None or part.code is COMPUTE:
        return original(module, *args, **kwargs)
    states = hidden_states(args, kwargs)
    if _repeats(part, 0):
        return original(module, *args, **kwargs)
    if part.code is REUSE or part.code is ANSWER:
        if _fits(part, states):
            return _answered(part)
        part.unfit = True
    output = original(module, *args, **kwargs)
    output_place = part.places[0]
    # Clone: inside a graph, in-place writes of later operations cannot be detected.
    output_place.value = cloned(output)
    output_place.states = None if states is None else (states.shape, states.dtype, states.device)
    return output


def _fits(part: Part, states: torch.Tensor | None) -> bool:
    """Return False if the hidden states had the shape of the output, and have another shape now.

    The root model checks its own inputs. This check serves models that change the number of tokens inside.
    """
    kept = leaves(part.history[0])
    return not part.square or states is None or kept[0].shape == states.shape


def _answered(part: Part) -> Any:
    newest = part.history[0]
    if part.answer.predicts:
        output = output_of(part.history, part.weights)
    else:
        output = cloned(newest) if part.clones else rebuilt_containers(newest)
    if part.answer.feedback:
        part.places[0].value = cloned(output)
    return output


# --- spans -----------------------------------------------------------------------------------------------


def _begin(part: Part, position: int, names: Names) -> None:
    """Clone the inputs of a segment's first block, since blocks may modify them in place."""
    assert part.form is not None
    link = part.form.links[position]
    if part.residuals and link.leads:
        inputs = passed(link.shape, names)
        part.bases[link.segment].value = tuple([None if tensor is None else tensor.clone() for tensor in inputs])


def _end(part: Part, position: int, output: Any) -> None:
    """Store the result of a segment after its last block."""
    assert part.form is not None
    ending = part.form.endings[position]
    if ending is None:
        return
    outputs = parts(output)[0]
    reached = [None if index is None else outputs[index] for index in ending.outputs]
    bases = part.bases[ending.segment].value if part.residuals else reached
    part.places[ending.segment].value = results(bases, reached, residuals=part.residuals, outputs=part.outputs)


def _suits(part: Part, position: int, names: Names) -> bool:
    """Return False if the first block of a span receives other shapes than at the compute."""
    assert part.form is not None
    if position > 0 or part.answer.skips:
        return True
    link = part.form.links[position]
    inputs = passed(link.shape, names)
    for index in range(len(inputs)):
        column = part.history[link.segment][index]
        if column is not None and column[0].shape != inputs[index].shape:
            return False
    return True


def _linked(part: Part, position: int, names: Names) -> Any:
    """Return the answer of one block of a span that reuses."""
    assert part.form is not None
    link = part.form.links[position]
    inputs = passed(link.shape, names)
    if link.leads and not part.answer.skips:
        inputs = _led(part, link.segment, inputs)
    return rebuilt(link.shape, inputs)


def _led(part: Part, segment: int, inputs: list[Any]) -> list[Any]:
    """Return the answer of the first block of a segment, which carries the result of the whole segment."""
    values = values_of(part.history[segment], part.weights[segment])
    answers = led(inputs, values, residual=part.answer.residual)
    if part.answer.feedback:
        fed = fed_back(inputs, values, answers, residuals=part.residuals, outputs=part.outputs)
        part.places[segment].value = fed
    return answers
