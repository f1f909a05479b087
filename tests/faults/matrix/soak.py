"""A long run with a fault every 30 to 60 seconds, at random, and then the proof that nothing was lost by them.

    PYTHONPATH=.:tests python -m faults.matrix.soak [--minutes 30] [--seed N]

Two ranks under `pretrain launch local` train from an S3 server (Ceph's radosgw) behind a proxy, or from a folder
where there is none. Whenever the launch ends with a code that asks for it, it is started again. At the end:
every position was trained on exactly once, in order; every listed checkpoint verifies; losses, weights and moments
are bitwise those of a run that nothing happened to; no process and no unfinished file is left. What it took is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from end_to_end.wrong_things import flip_a_byte
from faults.matrix import measured, table
from faults.matrix.player import require_the_references_end
from faults.matrix.runs import BATCH, Run, Tree, write_shards
from faults.matrix.verdict import require_nobody_left, require_nothing_left, require_sound_checkpoints
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw, missing_binaries

from pretrain.checkpoint.attempts import all_attempts
from pretrain.checkpoint.manifest import committed
from pretrain.metrics.effective import effective_time
from pretrain.metrics.journal import steps_of

STEP_SECONDS = 0.25  # the pace of a step: the reference, which does without, takes a fraction of the time
SHARE = 0.6  # of the time that is asked for: the rest goes for restarts
FAULT_SECONDS = (30.0, 60.0)
AGAIN = (
    1,
    75,
    128 + signal.SIGKILL,
)  # a supervisor that was killed says nothing: its scheduler starts it again
FROM_THE_STORE: Tree = {"data": {"cache_bytes": 1}, "storage": {"read_timeout_seconds": 2.0}}


@dataclass
class Soak:
    """One soak: the run, its store, and what was done to it."""

    run: Run
    proxy: FaultProxy | None
    draw: random.Random
    done: list[str] = field(default_factory=list)

    def strike(self) -> None:
        """One fault, drawn from those that the run can be hit by now."""
        faults: dict[str, Callable[[], object]] = {
            "SIGKILL of a rank": lambda: self._signal_rank(signal.SIGKILL),
            "SIGTERM of a rank": lambda: self._signal_rank(signal.SIGTERM),
            "SIGTERM of the supervisor": lambda: self._signal_supervisor(signal.SIGTERM),
            "SIGKILL of the supervisor": lambda: self._signal_supervisor(signal.SIGKILL),
            "SIGSTOP of a rank for 5 s": self._pause,
            "SIGKILL of a loader worker": lambda: self._kill(self.run.loader_workers()),
            "a damaged checkpoint, then SIGKILL of a rank": self._damage,
        }
        if self.run.writers():
            faults["SIGKILL of a checkpoint writer"] = lambda: self._kill(list(self.run.writers().values()))
        if self.proxy is not None:
            for kind in ("503", "stall", "close", "reset"):
                faults[f"S3: {kind}"] = lambda kind=kind: self._weather(kind)  # type: ignore[misc]
        name = self.draw.choice(sorted(faults))
        try:
            faults[name]()
        except (ProcessLookupError, KeyError, IndexError):
            name += " (nobody was there)"
        self.done.append(name)
        print(f"step {self.run.last_step()}: {name}", file=sys.stderr, flush=True)

    def _signal_rank(self, signum: signal.Signals) -> None:
        os.kill(self.draw.choice(sorted(self.run.ranks().values())), signum)

    def _signal_supervisor(self, signum: signal.Signals) -> None:
        assert self.run.process is not None
        self.run.process.send_signal(signum)

    def _kill(self, pids: list[int]) -> None:
        os.kill(self.draw.choice(pids), signal.SIGKILL)

    def _pause(self) -> None:
        pid = self.draw.choice(sorted(self.run.ranks().values()))
        os.kill(pid, signal.SIGSTOP)
        time.sleep(5.0)
        with contextlib.suppress(ProcessLookupError):  # a watchdog was quicker
            os.kill(pid, signal.SIGCONT)

    def _damage(self) -> None:
        newest = committed(self.run.run_dir)[-1]
        flip_a_byte(self.draw.choice(sorted(newest.glob("rank-*.safetensors"))))
        self._signal_rank(signal.SIGKILL)

    def _weather(self, kind: str) -> None:
        assert self.proxy is not None
        self.proxy.faults.extend([Fault(kind=kind, after_bytes=1000)] * self.draw.randrange(1, 10))


@contextlib.contextmanager
def store(folder: Path, shards: Path) -> Iterator[tuple[str, FaultProxy | None, dict[str, str]]]:
    """(URL of the shards, the proxy before it, the environment that leads there)."""
    if missing := missing_binaries():
        if os.environ.get("PRETRAIN_REQUIRE_SERVICES") == "1":
            raise SystemExit(f"no S3 server ({', '.join(missing)}), and PRETRAIN_REQUIRE_SERVICES=1")
        print("no radosgw here: training from a folder", file=sys.stderr)
        yield str(shards), None, {}
        return
    server = Radosgw()
    server.start()
    try:
        server.make_bucket("soak")
        for file in shards.iterdir():
            server.client().upload_file(str(file), "soak", f"shards/{file.name}")
        with FaultProxy(server.port) as proxy:
            node = folder / "node"
            node.mkdir(mode=0o700)
            environment = {
                **server.environment(),
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "AWS_EC2_METADATA_DISABLED": "true",
                "PRETRAIN_NODE_DIR": str(node),
            }
            yield "s3://soak/shards", proxy, environment
    finally:
        server.stop()


def endure(soak: Soak, *, longest_seconds: float) -> int:
    """Until the run has finished, with a fault now and then. How often it was started."""
    run, draw = soak.run, soak.draw
    deadline = time.monotonic() + longest_seconds
    run.start()
    strike_at = time.monotonic() + draw.uniform(*FAULT_SECONDS)
    while True:
        assert run.process is not None
        assert time.monotonic() < deadline, (
            f"not finished after {longest_seconds:g} s, at step {run.last_step()}"
        )
        code = run.process.poll()
        if code is not None:
            code = 128 - code if code < 0 else code
            if code == 0:
                return run.launches
            assert code in AGAIN, f"ended with {code}:\n{run.log.read_text()[-4000:]}"
            require_nobody_left(run)
            run.start()
        elif time.monotonic() >= strike_at:
            soak.strike()
            strike_at = time.monotonic() + draw.uniform(*FAULT_SECONDS)
        time.sleep(0.2)


def require_each_position_once(folder: Path, last_step: int) -> None:
    """Of a step that was done more than once, what the last process to do it trained on counts."""
    by_step: dict[tuple[int, int], dict[int, list[int]]] = {}
    last_pid: dict[tuple[int, int], int] = {}
    for rank, path in enumerate(sorted(folder.glob("rank-*.jsonl"))):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # torn by a kill
                continue
            key = (line["step"], rank)
            by_step.setdefault(key, {}).setdefault(line["pid"], []).extend(line["positions"])
            last_pid[key] = line["pid"]
    for step in range(1, last_step + 1):
        seen = Counter(g for key, pid in last_pid.items() if key[0] == step for g in by_step[key][pid])
        assert seen == Counter(range((step - 1) * BATCH, step * BATCH)), (
            f"step {step} trained on {sorted(seen)}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m faults.matrix.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="how long, about (default: 30)")
    parser.add_argument(
        "--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the faults"
    )
    args = parser.parse_args()
    steps = max(40, int(SHARE * args.minutes * 60 / STEP_SECONDS))
    changes: Tree = {
        "train": {"steps": steps},
        "checkpoint": {"every_steps": 20, "keep_last": 3},
        "data": {"workers": 1},
    }
    print(f"seed {args.seed}, {steps} steps", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        shards = write_shards(folder)
        url, proxy, environment = stack.enter_context(store(folder, shards))
        positions = folder / "positions"
        positions.mkdir()
        run = Run(
            folder=folder / "soak",
            shards=url,
            changes={
                **changes,
                "data": {"workers": 1, **FROM_THE_STORE["data"]},
                "storage": FROM_THE_STORE["storage"],
            },
            faults=[{"do": "sleep", "at": "forward", "seconds": STEP_SECONDS}],
            environment={**environment, "MATRIX_POSITIONS": str(positions)},
        )
        stack.callback(run.close)
        soak = Soak(run, proxy, random.Random(args.seed))
        began = time.monotonic()
        launches = endure(soak, longest_seconds=args.minutes * 60 * 3 + 300)
        wall = time.monotonic() - began

        require_nobody_left(run)
        require_nothing_left(run)
        require_sound_checkpoints(run.run_dir)
        require_each_position_once(positions, steps)
        reference = Run(
            folder=folder / "reference", shards=str(shards), changes={**changes, "data": {"workers": 0}}
        )
        stack.callback(reference.close)
        reference.start()
        code = reference.end(seconds=wall + 600)
        assert code == 0, reference.said()[-4000:]
        require_the_references_end(run, reference)

        counted = sum(line["step_seconds"] for line in steps_of(run.journal()).values())
        reported = effective_time(run.journal(), all_attempts(run.run_dir, run.journal()))
        told = ", ".join(f"{count} × {what}" for what, count in sorted(Counter(soak.done).items()))
        rejected = sum(line["event"] == "checkpoint_rejected" for line in run.journal())
        said = (
            f"{wall / 60:.0f} minutes, {len(soak.done)} faults (seed {args.seed}), {launches} launches, "
            f"{run.attempts()} attempts, {steps} steps: {told}. Every position came exactly once, every listed "
            f"checkpoint verified ({rejected} damaged ones were passed over), losses, weights and moments are bitwise "
            f"those of a run that nothing happened to. Effective training time {counted / wall:.1%} of the whole "
            f"({reported.share:.1%} in `pretrain report`, which leaves out what passes between an end that was asked "
            f"for and the next start), with a fault every {wall / max(1, len(soak.done)):.0f} s and a start of about "
            "ten seconds."
        )
    print(said)
    if os.environ.get(measured.VARIABLE) == "1":
        measured.write(measured.SOAK, {"said": said})
        table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
