"""Start a new run from a checkpoint of another: its weights, optimizer state and place in the data, other settings.

    pretrain fork runs/a runs/longer train.steps=200000                  from its newest checkpoint, a longer cosine
    pretrain fork runs/a@80000 runs/cool train.steps=90000 optim.schedule=constant optim.cooldown_steps=10000
    pretrain fork runs/a@80000 runs/gentle optim.lr=1e-4                 from before a spike, at a lower rate

What may change on a resume may change in a fork (`pretrain train --help` lists it): rate, schedule and its end,
batch split, ZeRO stage, validation … Network, objective, seed and data stay, else the fork is refused with a diff
(exit 4); `init_from=RUN` takes a backbone along to a run that is another in those. The fork consumes what RUN would
have, sample by sample. Its origin is in NEW/lineage.json and in its journal; RUN is only read. Then:

    pretrain train NEW/config.yaml               (or pretrain launch local NEW/config.yaml …)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

from pretrain.checkpoint.compatibility import (
    changed_keys,
    check_batch_size,
    check_resumable,
    config_differences,
)
from pretrain.checkpoint.courses import read_given_up, standing
from pretrain.checkpoint.distrusted import DISTRUSTED_NAME
from pretrain.checkpoint.lineage import Lineage, copy_checkpoint, read_lineage, write_lineage
from pretrain.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST_NAME,
    Manifest,
    read_manifest,
    step_folder,
)
from pretrain.checkpoint.mirrored import bring_files
from pretrain.checkpoint.retention import step_of
from pretrain.checkpoint.run_directory import write_whole
from pretrain.checkpoint.segments import FILES, SEGMENTS_NAME
from pretrain.checkpoint.skipped import SKIPPED_NAME
from pretrain.config.load import as_yaml, overridden, with_defaults
from pretrain.config.schema import RunConfig
from pretrain.data.ledger import LEDGER_FOLDER, read_ledger
from pretrain.datasets import CONFIG_NAME, RunData, first_datasets, open_run_data
from pretrain.derived import build_schedule, dataset_facts, total_steps
from pretrain.errors import CheckpointMismatchError, ConfigError, PretrainError, UsageError
from pretrain.metrics.journal import JOURNAL_NAME, Journal, read_journal

# What says which samples stand where: the fork has it from its parent.
ORDER_FILES = (SEGMENTS_NAME, FILES, SKIPPED_NAME)
FORK_ATTEMPT = 0  # before the fork's first own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "parent", metavar="RUN[@STEP]", help="a run's folder (its newest checkpoint), or a step of it"
    )
    parser.add_argument("new", metavar="NEW", type=Path, help="the new run's folder, which must not be there")
    parser.add_argument(
        "overrides", metavar="key.path=value", nargs="*", help="what is to be other than in RUN"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check it all and say what would be; write nothing"
    )


def run(args: argparse.Namespace) -> int:
    run_dir, checkpoint = find_parent(args.parent)
    new: Path = args.new
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise UsageError(f"{new}: is there already; a fork begins in a folder of its own, choose another")
    manifest = read_manifest(checkpoint)
    before = with_defaults(
        manifest.config
    )  # as a resume does: it trained as a key's default says that came later
    manifest = replace(manifest, config=before)
    config = forked_config(before, args.overrides, new=new, where=str(checkpoint))
    changed = changed_keys(before, config.model_dump(mode="json"))
    data = _check(config, manifest, run_dir, where=str(checkpoint))
    _say(manifest, config, data, changed, checkpoint)
    if args.dry_run:
        print("nothing was written (--dry-run)")
        return 0
    staging = new.with_name(f".{new.name}.forking")
    try:
        staging.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{staging}: another fork is under way, or was killed; remove it if so") from None
    except OSError as error:
        raise UsageError(f"{new}: cannot be made: {error}; choose another folder") from None
    try:
        _fill(staging, run_dir, checkpoint, config, changed)
        staging.rename(new)
    except OSError as error:
        raise PretrainError(f"{new}: cannot be written: {error}; free space and try again") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"done; start it: pretrain train {new / CONFIG_NAME}")
    return 0


def find_parent(text: str) -> tuple[Path, Path]:
    """The run's folder and the checkpoint's that RUN, RUN@STEP or a checkpoint's folder names.

    Raises UsageError when there is no such run or step.
    """
    name, at, step = text.rpartition("@")
    if at and step.isdigit() and not Path(text).exists():
        run_dir, wanted = Path(name), int(step)
    else:
        run_dir, wanted = Path(text), None
    if (run_dir / MANIFEST_NAME).is_file() and wanted is None:
        return run_dir.resolve().parents[1], run_dir
    folders = standing(run_dir)
    if not folders:
        raise UsageError(
            f"{run_dir}: there is no checkpoint in it; give the folder of a run that has saved one, or bring it back "
            "from its mirror: pretrain checkpoints MIRROR --bring-back RUN"
        )
    if wanted is None:
        return run_dir, folders[-1]
    for folder in folders:
        if step_of(folder) == wanted:
            return run_dir, folder
    there = ", ".join(str(step_of(folder)) for folder in folders)
    raise UsageError(f"{run_dir}: has no checkpoint of step {wanted}; it has those of {there}")


def forked_config(before: dict, overrides: list[str], *, new: Path, where: str) -> RunConfig:
    """The parent's config with `overrides`. Raises ConfigError, and CheckpointMismatchError with a diff."""
    if any(override.startswith("run_dir=") for override in overrides):
        raise ConfigError("run_dir: a fork's is NEW; leave it out")
    config = overridden({**before, "run_dir": str(new)}, overrides, source=where)
    if config.checkpoint.mirror is not None and config.checkpoint.mirror == before["checkpoint"]["mirror"]:
        raise ConfigError(
            f"checkpoint.mirror={config.checkpoint.mirror} is the parent's, and two runs cannot share one; give "
            "another, or checkpoint.mirror=null"
        )
    if differences := config_differences(before, config.model_dump(mode="json")):
        raise CheckpointMismatchError(_refusal(where, "\n".join(differences)))
    return config


def _refusal(where: str, differences: str) -> str:
    return (
        f"{where} cannot be forked so; leave these as they are, or start a new run with init_from, which takes "
        f"its backbone along:\n{differences}"
    )


def _check(config: RunConfig, manifest: Manifest, run_dir: Path, *, where: str) -> RunData:
    """The data that the fork will consume, which is what its parent does. Raises when it could not go on."""
    check_batch_size(manifest, config.train.global_batch_size, where=where)
    same_source = config.data.model_dump(mode="json")["train"] == manifest.config["data"]["train"]
    data = open_run_data(
        config.model_copy(update={"run_dir": str(run_dir)}),
        lanes=manifest.order["lanes"],
        consumed=manifest.samples,
        **first_datasets(config, manifest, look_there=same_source),
    )
    if read_given_up(run_dir).has(manifest):
        raise CheckpointMismatchError(
            f"{where} is of a course that the run has given up: it has consumed samples that are jumped over since "
            f"({SKIPPED_NAME}), or its weights are not trusted ({DISTRUSTED_NAME}); fork an older one, or a newer one"
        )
    check_resumable(
        manifest,
        config=config.model_dump(mode="json"),
        dataset=dataset_facts(data.indexes),
        order=data.stream.fingerprint(),
        segments=data.segments,
        skipped=data.skipped,
        parameters=manifest.parameters,
        where=where,
    )
    data.require_from(manifest.samples)
    if (steps := total_steps(config, data.stream)) <= manifest.step:
        raise ConfigError(
            f"train.steps: the fork would end at step {steps}, and {where} is at step {manifest.step}; give it more, "
            f"for example train.steps={2 * manifest.step}"
        )
    build_schedule(config, total_steps=steps)
    return data


def _say(
    manifest: Manifest, config: RunConfig, data: RunData, changed: dict[str, dict], checkpoint: Path
) -> None:
    steps = total_steps(config, data.stream)
    lr = build_schedule(config, total_steps=steps)(manifest.step)
    print(
        f"{config.run_dir}: from {checkpoint}, step {manifest.step:,} ({manifest.samples:,} samples), to {steps:,}"
    )
    for key, of in changed.items():
        print(f"  {key}: {of['before']!r} -> {of['now']!r}")
    print(f"  learning rate of its first step: {lr:.4g}")


def _fill(
    staging: Path, run_dir: Path, checkpoint: Path, config: RunConfig, changed: dict[str, dict]
) -> None:
    """All of a new run's folder. Raises CheckpointError for a damaged checkpoint, else PretrainError or OSError."""
    for name in ORDER_FILES:
        if (run_dir / name).is_dir():
            shutil.copytree(run_dir / name, staging / name)
        elif (run_dir / name).is_file():
            shutil.copyfile(run_dir / name, staging / name)
    (staging / CHECKPOINTS).mkdir()
    bring_files(checkpoint)
    manifest = copy_checkpoint(checkpoint, staging / CHECKPOINTS / step_folder(step_of(checkpoint)))
    lineage = _lineage(run_dir, checkpoint, manifest, changed)
    write_lineage(staging, lineage)
    write_whole(staging / CONFIG_NAME, as_yaml(config).encode())
    _begin_journal(run_dir, staging, manifest, lineage)


def _lineage(run_dir: Path, checkpoint: Path, manifest: Manifest, changed: dict[str, dict]) -> Lineage:
    before = read_lineage(run_dir)
    return Lineage(
        parent=str(run_dir.resolve()),
        checkpoint=step_folder(manifest.step),
        manifest_sha256=hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest(),
        step=manifest.step,
        samples=manifest.samples,
        attempt=manifest.attempt,
        changed=changed,
        ancestors=[] if before is None else before.as_parent(),
        time=time.time(),
    )


def _begin_journal(run_dir: Path, staging: Path, manifest: Manifest, lineage: Lineage) -> None:
    """The fork's diary begins with what an audit must know of the positions that its ancestors consumed."""
    journal = Journal(staging / JOURNAL_NAME, attempt=FORK_ATTEMPT)
    try:
        records = read_journal(run_dir / JOURNAL_NAME)
    except FileNotFoundError:
        records = []
    for record in records:
        if record.get("event") in ("data", "rollback") and int(record["samples"]) < manifest.samples:
            kept = {name: record[name] for name in ("step", "samples", "global_batch_size")}
            journal.append("data", **kept)
    fields = {name: value for name, value in asdict(lineage).items() if name not in ("time", "attempt")}
    journal.append("fork", parent_attempt=lineage.attempt, **fields)
    journal.sync()
    journal.close()
    replaced = [record for record in read_ledger(run_dir) if record["g"] < manifest.samples]
    if replaced:
        lines = "".join(json.dumps(record) + "\n" for record in replaced)
        (staging / LEDGER_FOLDER).mkdir()
        write_whole(
            staging / LEDGER_FOLDER / f"attempt-{FORK_ATTEMPT}-rank-0.jsonl",
            lines.encode("utf-8", "surrogateescape"),
        )
