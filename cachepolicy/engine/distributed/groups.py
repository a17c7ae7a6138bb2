"""The processes that hold pieces of one sample: which ones they are, and how they add up a few numbers.

All of it is torch.distributed. The numbers go over a group of the same processes with a backend of the CPU (gloo), made
once: a message of a process that failed can so never be paired with a collective of the model.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# What torch.distributed gives has no types.

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Generator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from cachepolicy.errors import PolicyError

Ranks = tuple[int, ...]


def member_ranks(process_group: Any) -> Ranks:
    """The ranks of a `ProcessGroup`, or of a `DeviceMesh` of any number of dimensions, that this process is in.

    Raises:
        PolicyError: it is neither, torch.distributed does not run, or this process is no member.
    """
    if not _running():
        raise _unfit("torch.distributed has not been initialised", "`torch.distributed.init_process_group(...)` first")
    if isinstance(process_group, distributed.ProcessGroup):
        ranks: Ranks = tuple(distributed.get_process_group_ranks(process_group))
    elif isinstance(process_group, DeviceMesh):
        ranks = tuple(process_group.mesh.flatten().tolist())
    else:
        raise _unfit(
            f"`process_group` is a `{type(process_group).__name__}`",
            "a `ProcessGroup` or `DeviceMesh` that this process is in, False for none, None to let it be found",
        )
    if distributed.get_rank() not in ranks:
        raise _unfit(f"`process_group` holds the processes {list(ranks)}, and this is {distributed.get_rank()}", None)
    return ranks


def _unfit(problem: str, help: str | None) -> PolicyError:
    return PolicyError.of("E309", problem, help=help)


def peers_of(process_group: Any, model: torch.nn.Module, *, known: bool = False) -> Peers | None:
    """Those who share the samples of `model`: as the caller says, or as diffusers' context parallelism does.

    None where every process has samples of its own: nothing is told and nothing found, False is told, or the group is
    of one. The first time all processes of the group have to ask, as they do at the start of a trajectory; with `known`
    nobody is waited for, and those who have never met are None.
    """
    if process_group is False:
        return None
    if process_group is None:
        process_group = _mesh_of(model)
        if process_group is None:
            return None
    ranks = member_ranks(process_group)
    return _met(ranks, process_group, known=known) if len(ranks) > 1 else None


def holders_of(model: torch.nn.Module, *, known: bool = False) -> Peers | None:
    """Those who hold the parameters of `model` in pieces, as FSDP2 and tensor parallelism have it; None without any.

    A module that runs on one of them and is skipped on another waits for pieces that nobody sends, or takes others for
    them.
    """
    if not _running() or distributed.get_world_size() == 1:
        return None
    held = {_holders(parameter) for parameter in model.parameters() if hasattr(parameter, "device_mesh")}
    ranks = max(held, key=len, default=())
    return _met(ranks, distributed.group.WORLD, known=known) if len(ranks) > 1 else None


def _holders(parameter: Any) -> Ranks:
    mesh = parameter.device_mesh
    cut = [place for place, each in enumerate(parameter.placements) if not each.is_replicate()]
    if len(cut) == 1:
        return tuple(distributed.get_process_group_ranks(mesh.get_group(cut[0])))
    return tuple(mesh.mesh.flatten().tolist()) if cut else ()


def _running() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _mesh_of(model: torch.nn.Module) -> Any:
    """The mesh over which diffusers splits tokens, whether it is Ulysses, ring or both; None where it does not."""
    if not _running() or distributed.get_world_size() == 1:
        return None
    for module in model.modules():  # the model may stand inside a wrapper
        config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
        mesh = getattr(config, "_flattened_mesh", None)
        if mesh is not None:
            return mesh
    return None


class Peers:
    """Processes that decide together, and the group over which they add up numbers; one for each set and timeout.

    `number` counts the trajectories that have begun, on every process alike.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        self.ranks = ranks
        self.rank = distributed.get_rank()
        self.timeout = timeout
        self.number = 0
        self.gone: set[int] = set()
        backend = "gloo" if distributed.is_gloo_available() else None
        self._device = torch.device("cpu") if backend else _accelerator()
        self._pending: list[tuple[Any, torch.Tensor]] = []
        with self._answered("the start of a trajectory"):
            self.group: Any = distributed.new_group(
                list(ranks),
                backend=backend,
                timeout=timeout,
                use_local_synchronization=True,
                group_desc="cachepolicy",
            )

    def add(self, numbers: Sequence[float], subject: str) -> list[float]:
        """The sums of these numbers over all processes, the same bits on each.

        Raises:
            PolicyError: a process did not answer in time, or is gone (E352).
        """
        message = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        with self._answered(subject):
            work: Any = distributed.all_reduce(message, group=self.group, async_op=True)
            work.wait(self.timeout)
        return message.tolist()

    def post(self, numbers: Sequence[float]) -> None:
        """Take part in the next sum without waiting for the others: this process has failed."""
        self._pending = [each for each in self._pending if not each[0].is_completed()]
        message = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        with contextlib.suppress(RuntimeError):  # the others are gone: there is nobody to tell
            self._pending.append((distributed.all_reduce(message, group=self.group, async_op=True), message))

    @contextlib.contextmanager
    def _answered(self, subject: str) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            # The group is of no use any more. The others will find the same, and all of them make a new one.
            _all.pop((self.ranks, self.timeout), None)
            said = str(error).rpartition("] ")[2].partition(". ")[0]
            raise PolicyError.of(
                "E352",
                f"the processes {list(self.ranks)} did not all answer at {subject}: {said}",
                help="one of them has ended, hangs, or is slower than the timeout of the group"
                f" ({self.timeout.total_seconds():g} s)",
            ) from error

    def leave(self) -> None:
        """At the end of the program: nobody waits for this process any more."""
        for work, _ in self._pending[-1:]:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=1))
        with contextlib.suppress(Exception):
            distributed.destroy_process_group(self.group)


_all: dict[tuple[Ranks, timedelta], tuple[Any, Peers]] = {}


def _met(ranks: Ranks, process_group: Any, *, known: bool) -> Peers | None:
    """The peers of these ranks; new ones the first time, and where torch.distributed was started anew since."""
    timeout = _timeout(process_group)
    world, peers = _all.get((ranks, timeout), (None, None))
    if world is not distributed.group.WORLD:
        peers = None if known else Peers(ranks, timeout)
        if peers is not None:
            _all[ranks, timeout] = (distributed.group.WORLD, peers)
    return peers


def _accelerator() -> Any:
    current: Any = getattr(getattr(torch, "accelerator", None), "current_accelerator", None)  # from torch 2.6
    return torch.device("cuda") if current is None else current()


_PATIENCE = timedelta(minutes=30)


def _timeout(process_group: Any) -> timedelta:
    """How long the group itself waits for its members; torch has no public name for it."""
    if isinstance(process_group, DeviceMesh):
        process_group = process_group.get_group(0)
    for device in getattr(process_group, "_device_types", ()) if hasattr(process_group, "_get_backend") else ():
        backend = process_group._get_backend(device)  # noqa: SLF001
        timeout = getattr(getattr(backend, "options", None), "_timeout", None)
        if timeout is not None:
            return timeout
    return _PATIENCE


@atexit.register
def _leave() -> None:
    if _running():
        for _, peers in _all.values():
            peers.leave()
