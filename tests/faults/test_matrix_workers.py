"""Rows of the fault matrix about `pretrain launch worker`: two nodes of a rank each, as two containers would run it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence

import pytest
from faults.matrix.player import (
    require_counted,
    require_saved_where_it_stopped,
    require_the_references_end,
    seconds_until_noticed,
)
from faults.matrix.references import References
from faults.matrix.row import Measured
from faults.matrix.rows_processes import WORKER_KILLED, WORKER_TOLD
from faults.matrix.runs import Run, is_alive, until
from faults.matrix.verdict import require_nobody_left, require_nothing_left, require_sound_checkpoints
from launching import free_port

pytestmark = pytest.mark.slow
NODES = 2


class Nodes:
    """The nodes of one run, each with what it started; all use the first one's recipe and folder."""

    def __init__(self, new_run: Callable[..., Run]) -> None:
        self.sides: Sequence[Run] = [new_run() for _ in range(NODES)]
        self.run = self.sides[0]
        self._port = free_port()

    def start(self, node: int) -> None:
        launch = [sys.executable, "-m", "pretrain.cli", "launch", "worker", str(self.run.recipe())]
        place = [
            "--nodes",
            NODES,
            "--node-rank",
            node,
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            self._port,
        ]
        self.sides[node].start([*launch, *map(str, place), "--processes", "1"])

    def signal(self, node: int, signum: signal.Signals) -> None:
        process = self.sides[node].process
        assert process is not None
        process.send_signal(signum)

    def ranks(self) -> list[int]:
        return [pid for side in self.sides for pid in side.ranks().values()]

    def train_until(self, step: int) -> None:
        for node in range(NODES):
            self.start(node)
        self.run.wait_for(lambda: self.run.last_step() >= step, f"step {step}")
        assert len(self.ranks()) == NODES

    def finish(self, reference: Run) -> None:
        assert [side.end() for side in self.sides] == [0] * NODES, self.said()
        require_the_references_end(self.run, reference)
        for side in self.sides:
            require_nobody_left(side)
            require_nothing_left(side)

    def said(self) -> str:
        return "\n".join(side.said()[-4000:] for side in self.sides)


@pytest.mark.parametrize("node", range(NODES))
def test_a_worker_that_is_told_to_stop_has_the_ranks_of_all_nodes_save_and_end(
    node: int,
    references: References,
    new_run: Callable[..., Run],
    measured: Callable[[Measured], None],
) -> None:
    row, nodes = WORKER_TOLD[node], Nodes(new_run)
    nodes.train_until(9)
    struck, step = time.monotonic(), nodes.run.last_step()
    nodes.signal(node, signal.SIGTERM)
    assert [side.end() for side in nodes.sides] == [row.code] * NODES, nodes.said()
    for side in nodes.sides:
        require_nobody_left(side)
    ended = time.monotonic() - struck
    require_counted(row, nodes.run, None)
    require_sound_checkpoints(nodes.run.run_dir)
    for number in range(NODES):
        nodes.start(number)
    nodes.run.wait_for(lambda: nodes.run.last_step() > step + 1, "a step beyond the last")
    recovered = time.monotonic() - struck
    nodes.finish(references.get())
    require_saved_where_it_stopped(nodes.run)
    measured(row.measured(ended=ended, recovered=recovered))


@pytest.mark.parametrize("node", range(NODES))
def test_a_worker_that_is_killed_takes_its_ranks_along_and_the_run_goes_on_when_it_is_there_again(
    node: int,
    references: References,
    new_run: Callable[..., Run],
    measured: Callable[[Measured], None],
) -> None:
    row, nodes = WORKER_KILLED[node], Nodes(new_run)
    nodes.train_until(9)
    ranks, struck = nodes.ranks(), time.monotonic()
    nodes.signal(node, signal.SIGKILL)
    until(lambda: not any(map(is_alive, ranks)), "the end of the ranks")
    ended, step = time.monotonic() - struck, nodes.run.last_step()
    assert nodes.sides[node].end() == row.code
    require_nobody_left(nodes.sides[node])
    require_sound_checkpoints(nodes.run.run_dir)
    nodes.start(node)
    nodes.run.wait_for(lambda: nodes.run.last_step() > step, "a step beyond the last")
    recovered = time.monotonic() - struck
    nodes.finish(references.get())
    require_counted(row, nodes.run, None)
    noticed = seconds_until_noticed(nodes.run, struck)
    measured(row.measured(noticed=noticed, ended=ended, recovered=recovered))
