"""List a run's checkpoints, verify them to the last byte, remove those that are not wanted any more.

  pretrain checkpoints RUN
  pretrain checkpoints RUN --verify
  pretrain checkpoints RUN --prune --keep-last 2 --keep-every 50000
  pretrain checkpoints s3://bucket/mirror                         (what a run's checkpoint.mirror holds)
  pretrain checkpoints s3://bucket/mirror --bring-back RUN        (make RUN, its folder, anew)

Besides checkpoints a run's folder may hold `….saving`, what a save that was cut short left (the next attempt
removes it), and `….rejected`, a damaged checkpoint that a resume passed over; --prune removes both kinds. A run
that is live is not pruned: it does so itself, by checkpoint.keep_last and checkpoint.keep_every_steps. `in the mirror`:
here are its manifest and what files this host needed, the rest is in checkpoint.mirror, which --prune leaves alone;
export, evaluate, replay, fork and training fetch what they need. `given up`: of a course that the run has left, because
it skips what that had consumed or trusts it no more; nobody goes on from it.

exit codes: 0 · 2 wrong usage, or the run is live · 4 --verify found damage, or there is no checkpoint
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.checkpoint.best import best_step
from pretrain.checkpoint.courses import given_up, standing
from pretrain.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST_NAME,
    MIRRORED_SUFFIX,
    Manifest,
    known,
    read_manifest,
)
from pretrain.checkpoint.mirror import IDENTITY, Mirror, MirroredSave
from pretrain.checkpoint.mirrored import answered_by_store, mirror_of, take_back
from pretrain.checkpoint.retention import kept_steps, remove_checkpoint, step_of
from pretrain.checkpoint.run_directory import held
from pretrain.checkpoint.verify import problems_of
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.storage import S3Settings, is_remote, join_url

_FACTS = ("samples", "attempt", "world_size", "zero_stage")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the run_dir of a run, or its checkpoint.mirror")
    parser.add_argument(
        "--verify", action="store_true", help="read every byte and compare it with its digest"
    )
    parser.add_argument(
        "--prune", action="store_true", help="remove checkpoints; wants --keep-last, --keep-every or both"
    )
    parser.add_argument("--keep-last", type=int, metavar="N", help="the newest N stay")
    parser.add_argument("--keep-every", type=int, metavar="STEPS", help="those of every STEPS-th step stay")
    parser.add_argument(
        "--bring-back",
        type=Path,
        metavar="DIR",
        help="of a mirror: make the run's folder here, with its journal, lists and its checkpoints' manifests; their "
        "files come when they are needed",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    if is_remote(args.run) or (Path(args.run) / "run.json").is_file():
        return _run_mirror(args)
    if args.bring_back is not None:
        raise UsageError(f"--bring-back wants the URL of a run's checkpoint.mirror: {args.run} is none")
    args.run = Path(args.run)
    _check(args)
    removed = prune(args.run, keep_last=args.keep_last or 0, keep_every=args.keep_every) if args.prune else []
    left = set(given_up(args.run))
    found = [
        {**entry, "given_up": folder in left}
        for folder in known(args.run)
        if (entry := describe(folder, verify=args.verify)) is not None
    ]
    leftovers = [{"path": str(path), "bytes": _size_of(path)} for path in leftovers_of(args.run)]
    if args.json:
        print(
            json.dumps({"checkpoints": found, "leftovers": leftovers, "removed": [str(p) for p in removed]})
        )
    else:
        _print(found, leftovers, removed)
    if not found:
        raise CheckpointError(f"{args.run}: holds no checkpoint")
    return CheckpointError.exit_code if any(entry["problems"] for entry in found) else 0


def _run_mirror(args: argparse.Namespace) -> int:
    """List what a mirror holds, or make the run's folder of it. It is only read."""
    for option in ("verify", "prune"):
        if getattr(args, option):
            raise UsageError(
                f"--{option} is for a run's folder: give the folder, or make one with --bring-back RUN"
            )
    mirror = Mirror(args.run, s3=S3Settings())
    if not answered_by_store(mirror.is_a_runs):
        raise UsageError(f"{args.run}: is not the checkpoint.mirror of a run, it has no run.json")
    if args.bring_back is not None:
        bring_back(mirror, args.bring_back)
    saves = answered_by_store(mirror.saves)
    found = [_described_save(mirror, save) for save in saves]
    if args.json:
        print(json.dumps({"checkpoints": found, "leftovers": [], "removed": []}))
    else:
        _print(found, [], [])
    if args.bring_back is not None:
        print(
            f"{args.bring_back} is the run's folder again, to be given to any command; the mirror, {args.run}, has the "
            f"checkpoints' files. Train on with run_dir={args.bring_back} checkpoint.mirror={args.run}"
        )
    if not found:
        raise CheckpointError(f"{args.run}: holds no checkpoint")
    return 0


def bring_back(mirror: Mirror, run_dir: Path) -> None:
    """Make `run_dir`, or bring it up to the mirror. Raises UsageError when it is another run's, or live."""
    if run_dir.exists() and any(run_dir.iterdir()) and not (run_dir / IDENTITY).is_file():
        raise UsageError(
            f"--bring-back {run_dir}: holds something else than this run; name a folder of its own"
        )
    with held(run_dir, make=True):
        answered_by_store(lambda: take_back(run_dir, mirror, push=False))


def _described_save(mirror: Mirror, save: MirroredSave) -> dict[str, Any]:
    manifest = answered_by_store(lambda: mirror.committed_manifest(save))
    entry: dict[str, Any] = {
        "path": join_url(mirror.url, save.folder),
        "step": save.step,
        "bytes": answered_by_store(lambda: mirror.size_of(save)),
        "time": None,  # stores' clocks are not ours
        "whole": False,
        "problems": None,
        "given_up": False,
    }
    if manifest is None:  # a live run has removed it meanwhile
        return entry
    return {**entry, **{name: getattr(manifest, name) for name in _FACTS}}


def _check(args: argparse.Namespace) -> None:
    if not args.run.exists():
        raise UsageError(
            f"{args.run}: there is no such folder; give a run_dir. Where the run has a checkpoint.mirror, give that, "
            f"with --bring-back {args.run} to have the folder again"
        )
    if not (args.run / CHECKPOINTS).is_dir():
        raise UsageError(f"{args.run}: is not the folder of a run, it has no {CHECKPOINTS}/; give a run_dir")
    for option in ("keep_last", "keep_every"):
        value = getattr(args, option)
        if value is not None and not args.prune:
            raise UsageError(f"--{option.replace('_', '-')} goes with --prune")
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} must be at least 1: got {value}")
    if args.prune and args.keep_last is None and args.keep_every is None:
        raise UsageError(
            "--prune removes all that is not kept; say what is, with --keep-last N or --keep-every N"
        )


def prune(run_dir: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Remove what need not stay, leftovers included. Raises UsageError while the run is live, and when none
    would be left.
    """
    with held(run_dir):
        # Those that were given up count for nothing: it is the others that the run goes on from.
        by_step = {step_of(folder): folder for folder in standing(run_dir)}
        best = best_step(run_dir, by_step)
        kept = kept_steps(by_step, keep_last=keep_last, keep_every_steps=keep_every, best=best)
        if by_step and not kept:
            raise UsageError(
                f"{run_dir}: --keep-every {keep_every} keeps none of the steps {sorted(by_step)}; add --keep-last 1"
            )
        doomed = [
            folder
            for folder in known(run_dir)
            if by_step.get(step_of(folder)) != folder or step_of(folder) not in kept
        ]
        for folder in doomed:
            remove_checkpoint(folder)
        leftovers = leftovers_of(run_dir)
        for path in leftovers:
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            except OSError as error:
                raise PretrainError(f"{path}: cannot be removed: {error}; check its permissions") from None
    return [*doomed, *leftovers]


def leftovers_of(run_dir: Path) -> list[Path]:
    """What stands beside the checkpoints and is none."""
    return sorted(set((run_dir / CHECKPOINTS).iterdir()) - set(known(run_dir)))


def describe(folder: Path, *, verify: bool) -> dict[str, Any] | None:
    """One checkpoint; `problems` is None when nobody looked. None when a live run has removed it meanwhile, which
    is no damage.
    """
    try:
        entry = _described(folder, verify=verify)
    except FileNotFoundError:
        return None
    return entry if (folder / MANIFEST_NAME).exists() else None


def _described(folder: Path, *, verify: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": str(folder), "step": step_of(folder), "bytes": _size_of(folder)}
    entry["time"] = (folder / MANIFEST_NAME).stat().st_mtime
    entry["whole"] = not folder.name.endswith(MIRRORED_SUFFIX)
    entry["problems"] = problems_of(folder, whole=entry["whole"]) if verify else None
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return {**entry, "problems": [str(error)]}
    if not entry["whole"]:
        entry["mirror"] = _mirror_url(folder, manifest)
    return {**entry, **{name: getattr(manifest, name) for name in _FACTS}}


def _mirror_url(folder: Path, manifest: Manifest) -> str | None:
    try:
        return mirror_of(folder, manifest).url
    except CheckpointError:
        return None


def _size_of(path: Path) -> int:
    """Of what is there: a live run removes and renames meanwhile."""
    total = 0
    for root, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(root, name)).st_size
    with suppress(FileNotFoundError):
        total += 0 if path.is_dir() else path.stat().st_size
    return total


def _print(found: list[dict[str, Any]], leftovers: list[dict[str, Any]], removed: list[Path]) -> None:
    for path in removed:
        print(f"removed {path}")
    if found:
        print(f"{'step':>10}  {'samples':>14}  {'size':>12}  {'saved by':<22}  {'age':>8}  state")
    for entry in found:
        saved_by = "?"
        if "attempt" in entry:
            ranks = f"{entry['world_size']} rank{'s' if entry['world_size'] > 1 else ''}"
            saved_by = f"{ranks}, ZeRO {entry['zero_stage']}, #{entry['attempt']}"
        state = "not looked at" if entry["problems"] is None else "damaged" if entry["problems"] else "sound"
        if not entry["whole"]:
            state += f", in the mirror{' ' + entry['mirror'] if entry.get('mirror') else ''}"
        if entry["given_up"]:
            state += ", given up"
        samples = f"{entry['samples']:,}" if "samples" in entry else "?"
        size = f"{entry['bytes'] / 1e6:,.1f} MB"
        age = "?" if entry["time"] is None else _age(entry["time"])
        print(f"{entry['step']:>10}  {samples:>14}  {size:>12}  {saved_by:<22}  {age:>8}  {state}")
    for entry in found:
        for problem in entry["problems"] or ():
            print(f"  {problem}")
    for leftover in leftovers:
        print(f"left over: {leftover['path']} ({leftover['bytes'] / 1e6:,.1f} MB)")


def _age(timestamp: float) -> str:
    seconds = max(0.0, time.time() - timestamp)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
