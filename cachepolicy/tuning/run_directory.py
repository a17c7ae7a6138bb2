# diffusers comes without complete types: what a scheduler holds is not known in the strict sense.
# pyright: basic
"""Keeps what a tuning has sampled in a folder, so that it goes on there after an interruption."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from cachepolicy.engine.tuned_for import config_hash
from cachepolicy.errors import PolicyError
from cachepolicy.tools.sampling import Sample
from cachepolicy.tuning.recording import OutputRecord
from cachepolicy.tuning.solver import SolverTrace

SETTINGS = "settings.json"
"""The file of a run directory that says whose results it holds."""
ELEMENTS = 8
"""Elements of each parameter by which the weights of a model are recognised."""
T = TypeVar("T")
_SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True)
class Form(Generic[T]):
    """How a result is written: `pack` makes plain data of it (numbers, texts, tensors, dicts, lists), `unpack` back."""

    pack: Callable[[T], Any]
    unpack: Callable[[Any], T]


class RunDirectory:
    """Results by what they are results of. Without a folder, nothing is kept.

    Each result is a file, which is written when the result is there. A run that is ended at any time leaves whole files
    only.

    Args:
        folder: Where the results are kept. It is created. None keeps nothing.
        settings: What all results of the folder have in common, such as the model.

    Raises:
        PolicyError: The folder holds results of other settings (E405), or it cannot be written (E152).
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, str]) -> None:
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        file = self._folder / SETTINGS
        try:
            kept: Any = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._write(file, lambda path: Path(path).write_text(json.dumps({**settings}, indent=1), encoding="utf-8"))
            return
        others = [name for name in settings if not isinstance(kept, dict) or kept.get(name) != settings[name]]
        if others:
            shown = ", ".join(others)
            raise PolicyError.of(
                "E405",
                f"`{self._folder}` holds what was sampled with other settings: {shown}",
                help="name another folder, or delete this one",
            )

    def recall(self, kind: str, key: Sequence[Any], produce: Callable[[], T], form: Form[T]) -> T:
        """Return a result: the kept one, or a new one, which is kept.

        Args:
            kind: The kind of the result. It begins the name of its file.
            key: What the result depends on, besides the settings.
            produce: Makes the result.
            form: How the result is written and read.

        Raises:
            PolicyError: A part of the key cannot be recognised when it is given again (E406), or the result cannot be
                written (E152).
        """
        if self._folder is None:
            return produce()
        file = self._folder / f"{kind}-{fingerprint(key)[:20]}.pt"
        # A file that cannot be read, such as one of another version, is made again.
        with contextlib.suppress(Exception):
            return form.unpack(torch.load(file, weights_only=True))
        result = produce()
        self._write(file, lambda path: torch.save(form.pack(result), path))
        return result

    def _write(self, file: Path, write: Callable[[str], object]) -> None:
        """Write a file under another name first, so that it is whole when it has its name."""
        name = None
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=file.parent)
            os.close(handle)
            write(name)
            os.replace(name, file)
        except OSError as error:
            raise PolicyError.of(
                "E152", f"`{file}` cannot be written: {(error.strerror or str(error)).lower()}"
            ) from error
        finally:
            if name is not None:
                with contextlib.suppress(OSError):
                    os.unlink(name)


# --- what a result depends on -----------------------------------------------------------------------------------


def fingerprint(*values: Any) -> str:
    """Return a hash of values: numbers, texts, tensors, generators, pictures, and collections of them.

    Raises:
        PolicyError: A value is of another type (E406).
    """
    hashed = hashlib.sha256()
    for value in values:
        for piece in _pieces(value):
            hashed.update(len(piece).to_bytes(8, "big"))
            hashed.update(piece)
    return hashed.hexdigest()


def _pieces(value: Any) -> Iterable[bytes]:
    """Yield bytes that tell a value from others."""
    match value:
        case torch.Tensor():
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        case torch.Generator():
            yield value.get_state().numpy().tobytes()
        case np.ndarray():
            yield f"{value.dtype} {value.shape}".encode()
            yield value.tobytes()
        case Mapping():
            yield f"mapping {len(value)}".encode()
            for key, item in value.items():
                yield str(key).encode()
                yield from _pieces(item)
        case list() | tuple() | set() | frozenset():
            items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
            yield f"{type(value).__name__} {len(value)}".encode()
            for item in items:
                yield from _pieces(item)
        case _ if isinstance(value, (*_SCALARS, torch.dtype, torch.device, np.generic)):
            yield f"{type(value).__name__} {value}".encode()
        case _ if hasattr(value, "tobytes") and hasattr(value, "size"):  # a picture of PIL
            yield f"{getattr(value, 'mode', '')} {value.size}".encode()
            yield value.tobytes()
        case _ if callable(value):
            yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}".encode()
        case _:
            raise PolicyError.of(
                "E406",
                f"a `{type(value).__name__}` among the arguments of a call cannot be recognised when it is given again",
                help="give numbers, texts, tensors, generators or pictures, or tune without a run directory",
            )


def settings_of(models: Sequence[nn.Module], sample: Any) -> dict[str, str]:
    """Return what the results of all calls have in common: the denoisers with their weights, and what samples them.

    Args:
        models: The denoisers.
        sample: The pipeline, or the function that samples.
    """
    sampled_by = sample if callable(sample) and hasattr(sample, "__qualname__") else type(sample)
    kinds = [f"{type(model).__name__} {config_hash(model)}" for model in models]
    return {
        "pipeline": f"{sampled_by.__module__}.{sampled_by.__qualname__}",
        "model": ", ".join(kinds),
        "weights": fingerprint([_weights(model) for model in models]),
        "torch": torch.__version__.partition("+")[0],
    }


def _config_text(configured: Any) -> str:
    # Names with an underscore say where a config came from and who wrote it.
    config = {name: value for name, value in getattr(configured, "config", {}).items() if not name.startswith("_")}
    return json.dumps(config, default=repr, sort_keys=True)


def _weights(model: nn.Module) -> dict[str, Any]:
    """Return the shape and a few elements of each parameter. Offloaded parameters on the meta device have none."""
    parameters = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {
        name: (str(value.dtype), tuple(value.shape), () if value.is_meta else value.reshape(-1)[:ELEMENTS].float())
        for name, value in parameters
    }


def scheduler_key(schedulers: Iterable[Any]) -> list[Any]:
    """Return what tells schedulers from others: their classes and configs."""
    return [(type(scheduler).__name__, _config_text(scheduler)) for scheduler in schedulers]


# --- results as plain data ---------------------------------------------------------------------------------------


SAMPLE: Form[Sample] = Form(
    lambda sample: {each.name: getattr(sample, each.name) for each in fields(sample)}, lambda data: Sample(**data)
)


def pack_records(records: Sequence[OutputRecord]) -> list[dict[str, Any]]:
    """Return the records of a run as plain data. Of a scheduler, its class and its plain attributes are kept."""
    packed = list[dict[str, Any]]()
    for record in records:
        trace = {each.name: getattr(record.solver, each.name) for each in fields(record.solver)}
        scheduler = trace.pop("scheduler")
        trace |= {"class": type(scheduler).__name__, "state": _plain_attributes(vars(scheduler))}
        trace |= {"timesteps": list(trace["timesteps"]), "arguments": [dict(each) for each in trace["arguments"]]}
        kept = {each.name: getattr(record, each.name) for each in fields(record)}
        packed.append({**kept, "solver": trace})
    return packed


def unpack_records(data: Sequence[Mapping[str, Any]], schedulers: Sequence[Any]) -> list[OutputRecord]:
    """Return the records of plain data.

    Args:
        data: What `pack_records` returned.
        schedulers: Schedulers of the same classes and configs as the recorded ones.
    """
    records = list[OutputRecord]()
    for kept in data:
        trace = dict(kept["solver"])
        name, state = trace.pop("class"), trace.pop("state")
        scheduler = copy.deepcopy(next(each for each in schedulers if type(each).__name__ == name))
        vars(scheduler).update({name: _restored(value) for name, value in state.items()})
        records.append(OutputRecord(**{**kept, "solver": SolverTrace(scheduler=scheduler, **trace)}))
    return records


_ARRAY = "numpy array"


def _plain_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that are plain data. Others, such as the config, are those of every copy."""
    packed = {name: _plain(value) for name, value in attributes.items()}
    return {name: value for name, value in packed.items() if value is not NotImplemented}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor) or type(value) in _SCALARS:
        return value
    if isinstance(value, np.ndarray):
        return {_ARRAY: torch.from_numpy(np.ascontiguousarray(value))} if value.dtype.kind in "fiub" else NotImplemented
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple):
        items = [_plain(item) for item in value]
        return NotImplemented if any(item is NotImplemented for item in items) else type(value)(items)
    return NotImplemented


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return value[_ARRAY].numpy()
    if type(value) in (list, tuple):
        return type(value)(_restored(item) for item in value)
    return value
