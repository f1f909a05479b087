"""Fuzz what reads bytes from outside: framer, tar walker, index reader, image decoder.

    make fuzz                                     ten minutes, two each
    python -m fuzz --minutes 10 [--target frame]  from tests/, with the project importable
    python -m fuzz --replay FILE --target frame   one input again

Guided by coverage where atheris is installed (the extra `fuzz`), by chance and the formats' structure otherwise.
Only DataError and UsageError may come out, within a second and 512 MB an input; and where webdataset or tarfile
accept the same bytes, they must find the same. A finding is written to fuzz-findings/ and ends its target; the
exit code says whether there was one.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SECONDS_AN_INPUT = 5
MEMORY_BYTES = 512 << 20  # on top of what the process has when it begins
FOLDER = Path("fuzz-findings")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all targets together (default: 10)")
    parser.add_argument("--target", metavar="NAME", help="only this one")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input, and show what it does")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = ("frame", "cut_chunks", "list_members", "index", "image")
    if args.target and args.target not in names:
        parser.error(f"--target {args.target}: there are {', '.join(names)}")
    if args.replay:
        from fuzz.targets import TARGETS

        TARGETS[args.target or "frame"].run(args.replay.read_bytes())
        print(f"{args.replay}: nothing wrong")
        return 0
    if args.worker:
        return fuzz(args.target, seconds=args.minutes * 60, seed=args.seed)
    chosen = [args.target] if args.target else list(names)
    found = 0
    for name in chosen:  # each in a process of its own: atheris ends the one that it runs in
        minutes = args.minutes / len(chosen)
        command = [sys.executable, "-m", "fuzz", "--worker", "--target", name]
        command += ["--minutes", str(minutes), "--seed", str(args.seed)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        code = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
        found += code != 0
    print(f"{len(chosen)} targets, {found} with a finding" + (f": see {FOLDER}/" if found else ""))
    return 1 if found else 0


class TooSlowError(Exception):
    pass


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TooSlowError(f"an input took more than {SECONDS_AN_INPUT} s")


class Runner:
    """Runs a target on inputs, within bounds, and writes findings down."""

    def __init__(self, name: str) -> None:
        from fuzz.targets import MAX_BYTES, TARGETS

        self.name, self.target, self.max_bytes = name, TARGETS[name], MAX_BYTES
        self.numbers = mmap.mmap(-1, 16)  # shared with the process that does the work: inputs, slowest
        signal.signal(signal.SIGALRM, _too_slow)
        warnings.simplefilter("ignore")  # Pillow's, about notes in damaged images
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, hard))

    def run(self, data: bytes) -> None:
        """Raises what the target should not have raised."""
        began = time.perf_counter()
        signal.alarm(SECONDS_AN_INPUT)
        try:
            self.target.run(data)
        except BaseException as error:
            signal.alarm(0)
            if not isinstance(error, KeyboardInterrupt):
                self.write_down(data, error)
            raise
        finally:
            signal.alarm(0)
            count, slowest = struct.unpack("qd", self.numbers[:16])
            self.numbers[:16] = struct.pack("qd", count + 1, max(slowest, time.perf_counter() - began))

    def write_down(self, data: bytes, error: BaseException) -> None:
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"{self.name}-{hashlib.sha256(data).hexdigest()[:12]}"
        path.write_bytes(data)
        lines = "".join(traceback.format_exception(error))
        print(f"{self.name}: FOUND, in {path} ({len(data)} bytes)\n{lines}", flush=True)

    def mutate(self, data: bytes, draw: random.Random) -> bytes:
        """Along the format, and by chance."""
        for _ in range(draw.randrange(1, 5)):
            data = self.target.change(data, draw) if draw.random() < 0.6 else by_chance(data, draw)
        return self.target.repair(data, draw)[: self.max_bytes]

    def summary(self, seconds: float) -> str:
        count, slowest = struct.unpack("qd", self.numbers[:16])
        return f"{self.name}: {count:,} inputs in {seconds:.0f} s ({count / seconds:,.0f}/s), slowest {slowest:.2f} s"


def fuzz(name: str, *, seconds: float, seed: int) -> int:
    try:
        import atheris
    except ImportError:
        return fuzz_by_chance(name, seconds=seconds, seed=seed)
    with atheris.instrument_imports(include=["pretrain.data", "pretrain.errors"]):
        runner = Runner(name)
    draw = random.Random(seed)
    began = time.monotonic()

    def one(data: bytes) -> None:
        runner.run(data)

    def mutate(data: bytes, max_size: int, number: int) -> bytes:
        draw.seed(number)
        if draw.random() < 0.3:
            data = atheris.Mutate(data, max_size)
        return runner.mutate(data, draw)[:max_size]

    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(runner.target.seeds()):
            (Path(corpus) / str(i)).write_bytes(data)
        child = os.fork()  # atheris does not come back
        if child == 0:
            options = [
                sys.argv[0],
                corpus,
                f"-max_total_time={max(1, int(seconds))}",
                f"-max_len={runner.max_bytes}",
                f"-seed={seed + 1}",
                f"-artifact_prefix={corpus}/",
                "-verbosity=0",
                "-rss_limit_mb=0",
                "-print_final_stats=0",
            ]
            atheris.Setup(options, one, custom_mutator=mutate)
            atheris.Fuzz()
            os._exit(0)
        _, status = os.waitpid(child, 0)
    print(runner.summary(time.monotonic() - began), flush=True)
    return int(os.waitstatus_to_exitcode(status) != 0)


def fuzz_by_chance(name: str, *, seconds: float, seed: int) -> int:
    runner, draw = Runner(name), random.Random(seed)
    corpus = runner.target.seeds()
    began = time.monotonic()
    try:
        for data in corpus:
            runner.run(data)
        while time.monotonic() - began < seconds:
            runner.run(runner.mutate(draw.choice(corpus), draw))
    except Exception:
        return 1
    finally:
        print(runner.summary(time.monotonic() - began), flush=True)
    return 0


def by_chance(data: bytes, draw: random.Random) -> bytes:
    if not data:
        return draw.randbytes(16)
    at, kind = draw.randrange(len(data)), draw.randrange(5)
    length = draw.choice((1, 2, 8, 100, 512))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + draw.randbytes(length) + data[at + length :]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] + data[at:]
    return data[:at]


if __name__ == "__main__":
    sys.exit(main())
