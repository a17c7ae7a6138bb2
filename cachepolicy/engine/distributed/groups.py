"""The processes that share samples or parameters, and their sums.

The sums use a separate process group with a CPU backend (gloo), created once, so that the message of a failed process
is never paired with a collective of the model.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch.distributed has no complete type annotations.

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
    """Return the ranks of a `ProcessGroup`, or of a `DeviceMesh` of any dimension.

    Raises:
        PolicyError: The object is neither, torch.distributed is not initialized, or this process is no member.
    """
    if not is_initialized():
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
    """Return the processes that share the samples of a model, or None.

    The first call for a group creates it, so all its processes have to call, as they do when a trajectory starts.

    Args:
        process_group: As for `apply`: a group, None to use diffusers' context parallelism, or False.
        model: The root model.
        known: Return only an existing group, without waiting for other processes.
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
    """Return the processes that hold shards of the parameters (FSDP2, tensor parallelism), or None.

    If a module runs on one of them and is skipped on another, its collectives hang or mix with others.

    Args:
        model: The root model.
        known: Return only an existing group, without waiting for other processes.
    """
    if not is_initialized() or distributed.get_world_size() == 1:
        return None
    held = {_holders(parameter) for parameter in model.parameters() if hasattr(parameter, "device_mesh")}
    ranks = max(held, key=len, default=())
    return _met(ranks, distributed.group.WORLD, known=known) if len(ranks) > 1 else None


def _holders(parameter: Any) -> Ranks:
    mesh = parameter.device_mesh
    cut = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    if len(cut) == 1:
        return tuple(distributed.get_process_group_ranks(mesh.get_group(cut[0])))
    return tuple(mesh.mesh.flatten().tolist()) if cut else ()


def is_initialized() -> bool:
    """Return True if this process belongs to a process group of torch."""
    return _AVAILABLE and distributed.is_initialized()


_AVAILABLE = distributed.is_available()


def _mesh_of(model: torch.nn.Module) -> Any:
    """Return the mesh of diffusers' context parallelism (Ulysses, ring or both), or None."""
    if not is_initialized() or distributed.get_world_size() == 1:
        return None
    for module in model.modules():  # the model may be inside a wrapper
        config = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
        mesh = getattr(config, "_flattened_mesh", None)
        if mesh is not None:
            return mesh
    return None


class Peers:
    """Processes that decide together, and their group. One instance exists per set of ranks and timeout.

    `number` counts the trajectories that have begun, equally on all processes.
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
        """Return the sums of these numbers over all processes, bit-identical on each.

        Raises:
            PolicyError: A process did not answer in time, or has ended (E352).
        """
        message = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        with self._answered(subject):
            work: Any = distributed.all_reduce(message, group=self.group, async_op=True)
            work.wait(self.timeout)
        return message.tolist()

    def post(self, numbers: Sequence[float]) -> None:
        """Contribute to the next sum without waiting, because this process has failed."""
        self._pending = [(work, message) for work, message in self._pending if not work.is_completed()]
        message = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        with contextlib.suppress(RuntimeError):  # the other processes have ended
            self._pending.append((distributed.all_reduce(message, group=self.group, async_op=True), message))

    @contextlib.contextmanager
    def _answered(self, subject: str) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            # The group is unusable after an error. All processes detect the error and create a new group.
            _all.pop((self.ranks, self.timeout), None)
            reason = str(error).rpartition("] ")[2].partition(". ")[0]
            raise PolicyError.of(
                "E352",
                f"the processes {list(self.ranks)} did not all answer at {subject}: {reason}",
                help="one of them has ended, hangs, or is slower than the timeout of the group"
                f" ({self.timeout.total_seconds():g} s)",
            ) from error

    def leave(self) -> None:
        """Finish pending messages and destroy the group at interpreter exit."""
        for work, _ in self._pending[-1:]:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=1))
        with contextlib.suppress(Exception):
            distributed.destroy_process_group(self.group)


_all: dict[tuple[Ranks, timedelta], tuple[Any, Peers]] = {}


def _met(ranks: Ranks, process_group: Any, *, known: bool) -> Peers | None:
    """Return the peers of these ranks. Create them the first time, and after a restart of torch.distributed."""
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
    """Return the timeout of the group. torch has no public API for it."""
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
    if is_initialized():
        for _, peers in _all.values():
            peers.leave()
