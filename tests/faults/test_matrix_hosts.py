"""Rows of the fault matrix about the network between hosts: namespaces with a bridge, as two hosts have."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from faults.matrix.player import (
    finish,
    require_counted,
    require_the_references_end,
    seconds_until_noticed,
)
from faults.matrix.references import References
from faults.matrix.row import Measured
from faults.matrix.rows_numbers import PARTITION
from faults.matrix.rows_processes import WATCHED
from faults.matrix.runs import Run, is_alive, until
from faults.matrix.verdict import require_nobody_left, require_sound_checkpoints
from services.required import skip_or_fail

pytestmark = pytest.mark.slow


class TwoHosts:
    """Two network namespaces, each with a veth into a third that holds a bridge; addresses of a private network."""

    def __init__(self) -> None:
        tag = uuid.uuid4().hex[:6]
        self.switch, self.hosts = f"m{tag}s", (f"m{tag}a", f"m{tag}b")
        self.addresses = ("10.213.7.1", "10.213.7.2")

    def make(self) -> None:
        for name in (self.switch, *self.hosts):
            self._ip("netns", "add", name)
        self._ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self.switch, "link", "set", "br0", "up")
        for number, (host, address) in enumerate(zip(self.hosts, self.addresses, strict=True)):
            port = f"v{number}"
            self._ip(
                "-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host
            )
            self._ip("-n", self.switch, "link", "set", port, "master", "br0")
            self._ip("-n", self.switch, "link", "set", port, "up")
            self._ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
            self._ip("-n", host, "link", "set", "eth0", "up")
            self._ip("-n", host, "link", "set", "lo", "up")

    def cut(self) -> None:
        self._ip("-n", self.switch, "link", "set", "v1", "down")

    def mend(self) -> None:
        self._ip("-n", self.switch, "link", "set", "v1", "up")

    def remove(self) -> None:
        for name in (*self.hosts, self.switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    made = TwoHosts()
    try:
        made.make()
    except (OSError, subprocess.CalledProcessError) as error:
        made.remove()
        skip_or_fail(f"no network namespaces can be made: {error}")
    yield made
    made.remove()


def start_on(hosts: TwoHosts, run: Run, rank: int, *, port: int) -> None:
    """One rank on its own host, as a launcher there would start it."""
    run.environment = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": hosts.addresses[0],
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    train = [sys.executable, "-m", "pretrain.cli", "train", str(run.recipe())]
    run.start(["ip", "netns", "exec", hosts.hosts[rank], *train])


def test_a_partition_ends_both_sides_only_one_of_them_writes_and_mended_the_run_goes_on(
    hosts: TwoHosts, references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    pace = {"do": "sleep", "at": "forward", "seconds": 0.2}
    sides = [new_run(changes=WATCHED, faults=[pace]) for _ in range(2)]
    run = sides[0]
    for other in sides[1:]:  # one run_dir that both hosts share
        other.changes = {**other.changes, "run_dir": str(run.run_dir)}
    for rank, side in enumerate(sides):
        start_on(hosts, side, rank, port=29511)
    run.wait_for(lambda: run.last_step() >= 9, "step 9")
    pids = [pid for side in sides for pid in side.ranks().values()]
    assert len(pids) == 2
    hosts.cut()
    struck = time.monotonic()
    until(lambda: not any(map(is_alive, pids)), "the end of both sides", seconds=60)
    ended = time.monotonic() - struck
    assert [side.end() for side in sides] == [PARTITION.code] * 2
    for side in sides:
        require_nobody_left(side)
    attempts = sorted(os.listdir(run.run_dir / "attempts"))
    assert attempts == ["1"], "the other side claimed the run, too"
    sound = require_sound_checkpoints(run.run_dir)
    assert sound
    expected = references.get().losses()
    assert run.losses() == {step: expected[step] for step in run.losses()}
    noticed = seconds_until_noticed(run, struck)

    hosts.mend()
    began, step = time.monotonic(), run.last_step()
    for rank, side in enumerate(sides):
        start_on(hosts, side, rank, port=29512)
    run.wait_for(lambda: run.last_step() > step, "a step beyond the last")
    recovered = ended + time.monotonic() - began
    for side in reversed(sides):
        finish(side)
    require_counted(PARTITION, run, None)
    require_the_references_end(run, references.get())
    measured(PARTITION.measured(noticed=noticed, ended=ended, recovered=recovered))
