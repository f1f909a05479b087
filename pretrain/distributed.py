"""Who is in this run: joining, agreeing, summing. Called by train.py; engines receive a `World`.

`RANK` and `WORLD_SIZE` in the environment mean a run of several processes; without them the
process is alone and nothing here touches a network.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.errors import LostPeerError, PretrainError, UsageError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among the run's processes.

    `launched` says whether a launcher started the process (then the engine is DeepSpeed's); `hosts` are the
    names of all ranks' machines, in rank order.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    launched: bool
    hosts: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        return self.rank == 0


_ADVICE = "start ranks with `deepspeed` or `pretrain launch`, or unset RANK, WORLD_SIZE and LOCAL_RANK for one process"


def _integer(name: str, *, below: int | None = None, at_least: int = 0) -> int:
    """The number in that environment variable. Raises UsageError when it is none, or out of range."""
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UsageError(f"{name}={text!r} in the environment is not a number; {_ADVICE}")
    number = int(text)
    if number < at_least or (below is not None and number >= below):
        upper = "" if below is None else f" to {below - 1}"
        raise UsageError(f"{name}={text} in the environment: {at_least}{upper} is possible; {_ADVICE}")
    return number


def is_launched() -> bool:
    """Did a launcher start this process as one of several ranks?

    Raises UsageError for half of a launcher's environment: neither reading of it would be safe.
    """
    given = {name: name in os.environ for name in ("RANK", "WORLD_SIZE")}
    if any(given.values()) != all(given.values()) or ("LOCAL_RANK" in os.environ and not any(given.values())):
        there = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ]
        missing = [name for name, is_given in given.items() if not is_given]
        raise UsageError(
            f"{' and '.join(there)} is set in the environment, {' and '.join(missing)} is not; {_ADVICE}"
        )
    return all(given.values())


def join(*, timeout_seconds: float = 600.0) -> World:
    """Join the run that the environment describes.

    Raises UsageError when a variable of the environment is missing or wrong, and PretrainError when
    the peers cannot be met within `timeout_seconds` or fewer came than were asked for.
    """
    if not is_launched():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return World(
            rank=0,
            local_rank=0,
            world_size=1,
            device=device,
            launched=False,
            hosts=(socket.gethostname(),),
        )
    world_size = _integer("WORLD_SIZE", at_least=1)
    rank = _integer("RANK", below=world_size)
    port = _integer("MASTER_PORT", at_least=1, below=65536)
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise UsageError(f"MASTER_ADDR is not set in the environment; {_ADVICE}")
    local_rank = _integer("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UsageError(
                f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; "
                "start as many processes as there are GPUs"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    except (RuntimeError, ValueError) as error:  # torch's DistError family is RuntimeError
        hint = (
            "another process has that port: choose another MASTER_PORT"
            if "EADDRINUSE" in str(error)
            else "look at what the other ranks said, and whether that address can be reached from here"
        )
        raise PretrainError(
            f"rank {rank} of {world_size} could not meet its peers at {host}:{port}: {error}; {hint}"
        ) from None
    # A launcher and a plugin that disagree give runs that each think they are alone.
    assert dist.get_world_size() == world_size, (
        f"asked for {world_size} ranks, joined {dist.get_world_size()}"
    )
    hosts = tuple(gather_objects(socket.gethostname()))
    return World(
        rank=rank, local_rank=local_rank, world_size=world_size, device=device, launched=True, hosts=hosts
    )


def lost_peer(error: RuntimeError) -> LostPeerError | None:
    """Our error for a collective that failed because a peer has gone; None for any other error."""
    if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
        return None
    return LostPeerError(
        f"rank {dist.get_rank()} lost a peer ({' '.join(str(error).split())}); "
        "what the others said before tells why"
    )


def be_patient(seconds: float) -> None:
    """Let the collectives of all groups made so far wait for peers this long before they fail by themselves.

    DeepSpeed makes groups of its own without asking us: they give up after torch's default, ten minutes
    on GPUs. Torch offers no public way to change a group that exists.
    """
    if dist.is_initialized():
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


@contextmanager
def lost_peers_named() -> Iterator[None]:
    """In this block a collective that fails because a peer has gone raises LostPeerError."""
    try:
        yield
    except RuntimeError as error:
        if (lost := lost_peer(error)) is None:
            raise
        raise lost from error


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """`values` summed over all ranks, in place, on their device; every rank gets the sum."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: T) -> list[T]:
    """Each rank's `value`, in rank order, on every rank. For small things: it goes through pickle,
    between processes of one run, never through a file."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_tensors(values: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's `values`, of one shape and type, in rank order, on every rank."""
    if not dist.is_initialized():
        return [values]
    world_size = dist.get_world_size()
    gathered = values.new_empty(world_size * values.numel())
    dist.all_gather_into_tensor(gathered, values.flatten())
    return list(gathered.view(world_size, *values.shape))


def gather_rows(rows: torch.Tensor, *, world: World, piece_bytes: int = 64 << 20) -> torch.Tensor:
    """All ranks' rows, in rank order, on rank 0's host; an empty tensor on the others.

    rows: (N, …) on the host, of one type and width on all ranks; N may differ. They travel in pieces, so that no
    device holds more than about `piece_bytes` of them.
    """
    if not dist.is_initialized():
        return rows
    counts = gather_objects(len(rows))
    row_bytes = rows[:1].numel() * rows.element_size() if len(rows) else rows.element_size()
    piece_rows = max(1, piece_bytes // (max(gather_objects(row_bytes)) * world.world_size))
    pieces: list[list[torch.Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), piece_rows):
        length = min(piece_rows, max(counts) - start)
        piece = torch.zeros(length, *rows.shape[1:], dtype=rows.dtype)
        own = rows[start : start + length]
        piece[: len(own)] = own
        piece = piece.to(world.device)
        into = [torch.empty_like(piece) for _ in counts] if world.is_main else None
        dist.gather(piece, into, dst=0)
        for rank, arrived in enumerate(into or []):
            pieces[rank].append(arrived[: max(0, counts[rank] - start)].cpu())
    return torch.cat([rows[:0], *(one for of_rank in pieces for one in of_rank)])


def from_main(world: World, make: Callable[[], T], *, patiently: bool = False) -> T:
    """What rank 0's `make()` returns, on every rank; its error is every rank's error.

    `patiently`: the peers wait up to a day, for work that may outlast the run's usual patience.
    """
    outcome: list[Any] = [None, None]
    group = None
    if patiently and dist.is_initialized():
        group = dist.new_group(timeout=timedelta(days=1))
    if world.is_main:
        try:
            outcome[0] = make()
        except PretrainError as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def from_main_in_pieces(
    world: World,
    make: Callable[[Callable[[], None]], T],
    *,
    moved: Callable[[], None],
    every_seconds: float = 1.0,
) -> T:
    """As from_main, for work that may take longer than ranks may stand still.

    `make(alive)` calls `alive` between its pieces; then `moved` is called there and, every so many seconds, on the
    ranks that wait. Rank 0 in a piece that does not end is what their watchdogs find: they wait, and it does not move.
    """
    if not dist.is_initialized():
        return make(moved)
    if not world.is_main:
        while True:
            message: list[Any] = [None]
            dist.broadcast_object_list(message, src=0)
            moved()
            kind, value = message[0]
            if kind == "error":
                raise value
            if kind == "result":
                return value
    told = monotonic()

    def alive() -> None:
        nonlocal told
        moved()
        if monotonic() - told >= every_seconds:
            dist.broadcast_object_list([("alive", None)], src=0)
            told = monotonic()

    try:
        result = make(alive)
    except PretrainError as error:
        dist.broadcast_object_list([("error", error)], src=0)
        raise
    dist.broadcast_object_list([("result", result)], src=0)
    return result


def together(action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on one, it fails on all, with the first rank's error.

    Without this a rank that raises alone leaves its peers waiting in their next collective.
    """
    result: Any = None
    failure: PretrainError | None = None
    try:
        result = action()
    except PretrainError as error:
        failure = error
    failures = [error for error in gather_objects(failure) if error is not None]
    if failures:
        raise failures[0]  # the same on every rank: callers decide by its type
    return result


class Sums:
    """Named sums of a step, kept on the device and read once, over all ranks.

    by_rank: what each rank told by `add_own`, in rank order; there after `over_ranks`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._values: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, float] = {}  # of the host; they go to the device together
        self._own: dict[str, float] = {}
        self.by_rank: dict[str, list[float]] = {}

    def add(self, **values: torch.Tensor | float) -> None:
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().to(self._device, torch.float64)
                self._values[name] = self._values[name] + value if name in self._values else value
            else:
                self._numbers[name] = self._numbers.get(name, 0.0) + value

    def add_own(self, **values: float) -> None:
        """Numbers of this rank that are not to be summed."""
        self._own.update(values)

    def over_ranks(self) -> dict[str, float]:
        """Each sum over all ranks, read from the device in one go. Every rank must have the same names."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # A number of one rank is a sum as well: of a vector that is zero elsewhere.
        own = torch.zeros(len(self._own), world_size, dtype=torch.float64)
        own[:, rank] = torch.tensor(list(self._own.values()), dtype=torch.float64)
        numbers = torch.tensor(list(self._numbers.values()), dtype=torch.float64)
        host = torch.cat([numbers, own.flatten()]).to(self._device)
        total = sum_over_ranks(
            torch.cat([*(value.reshape(1) for value in self._values.values()), host])
        ).tolist()
        names = [*self._values, *self._numbers]
        self.by_rank = {
            name: total[len(names) + i * world_size :][:world_size] for i, name in enumerate(self._own)
        }
        return dict(zip(names, total[: len(names)], strict=True))
