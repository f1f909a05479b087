"""Write tests/faults/README.md: the rows, with what was measured. Called by __main__.py; a test holds it true."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from faults.matrix import measured
from faults.matrix.row import Entry
from faults.matrix.rows import PLAYED, ROWS
from faults.matrix.runs import BATCH, SAVE_EVERY, STEPS

README = Path(__file__).resolve().parent.parent / "README.md"

BEFORE = """# The fault matrix

What happens to a run when something goes wrong. Most rows are launches: a small ViT in float32 on two to eight gloo
ranks under `pretrain launch local`, or `launch worker` where that is said, {STEPS} steps of {BATCH} images, a
checkpoint every {SAVE_EVERY}. The two hosts that are parted have a rank each, without a launcher. Three rows are many
tries without a run: a saving process and a writer that are killed, bits that flip. {ALONE} are one process without a
launcher, as each process finds for itself what they show:
{ALONE_NAMES}.

A fault strikes; the run goes on, or the attempt ends with the exit code and within the bound below and the run is
started again: after 1, and after a 75 that nobody asked the supervisor for, by the supervisor itself
(`--max-restarts` is 3, as by default); where that was killed or told to stop, or where a cause had to be removed
first, by hand, as a scheduler would. In the end it must be the run that nothing happened to:

- on as many ranks weights, moments and every loss are bitwise those of the uninterrupted reference run; on other
  numbers of ranks the state is bitwise the same when loaded and ten losses agree within 1e-5;
- every checkpoint that is listed verifies;
- no process is left, and no unfinished file: in the run's folder, among cached chunks, in the folder of temporary
  files, in shared memory;
- what should count the fault counted it.

`make faults` plays all rows and writes this page; `PYTHONPATH=.:tests python -m faults.matrix --only WORDS` plays
some, `--missing` all and keeps the times of those that are new or have changed. Times are seconds from the fault on
(from the start of the launch, where the damage was there before), one measurement each, on two shared cores.
*Noticed*: until a line of the journal, a watchdog or a rank's exit record said that something was wrong. There is
none where a run was told to stop, where something is retried or nothing is wrong, and where the fault took along
whoever would have written it. *Ended*: until the last process of the attempt was gone. *Back*: until the run was
beyond where it had been; of a restart most is imports, about ten seconds there.{BESIDE}{NOT_LOOKED_FOR}

"""
BESIDE = "\n\\*: measured on a machine that was busy with other work as well."
NOT_LOOKED_FOR = "\nRows whose times are older than that column have none in it yet."

DEEPSPEED = """
## The same signals, plain `deepspeed`

The same run as `deepspeed --num_gpus 2 --module pretrain.train …`, by `make faults-deepspeed`. *Left*: processes of the
run still alive 20 s after the launcher had ended (or after the signal, where it had not).

| signal | to | `deepspeed` ends with | after, s | left |
|---|---|---|---|---|
"""

OF_THE_SOAK = """\
`make soak` plays it and writes this. The best that is published is 97 %, on 9,600 GPUs (ByteRobust,
arXiv:2509.16293). A fault here costs about 11 s, most of them imports: 97 % takes a fault no more often than about
every 6 minutes (11 s of 367); the soak has them far closer.
"""

RESHARDING = """
## Other numbers of ranks, without launches

`tests/checkpoint/test_resharding.py` takes the state of 8 logical ranks over to 1, 2, 3, 4, 7 and 16 and back to 8, in
the cuts of all ZeRO stages: not a bit differs.
"""
COUNTS = {3: "Three", 4: "Four", 5: "Five"}


def seconds(value: object, mark: str = "") -> str:
    return f"{value:.1f}{mark}" if isinstance(value, int | float) else ""


def mark_of(took: Mapping[str, object]) -> str:
    return "\\*" if took.get("beside_other_work") else ""


def line(entry: Entry, known: dict[str, dict[str, object]]) -> str:
    took = known.get(entry.fault, {})
    mark = mark_of(took)
    code = "goes on" if entry.code == 0 else str(entry.code)
    cells = (
        entry.fault,
        entry.outcome,
        code,
        f"{entry.bound_seconds:g}",
        seconds(took.get("noticed_seconds"), mark),
        seconds(took.get("ended_seconds"), mark),
        seconds(took.get("recovered_seconds"), mark),
        str(entry.counted or ""),
    )
    return "| " + " | ".join(cells) + " |"


def before(known: dict[str, dict[str, object]]) -> str:
    alone = [row.fault for row in PLAYED if row.world_size == 0]
    return BEFORE.format(
        STEPS=STEPS,
        BATCH=BATCH,
        SAVE_EVERY=SAVE_EVERY,
        ALONE=COUNTS[len(alone)],
        ALONE_NAMES="; ".join(alone),
        BESIDE=BESIDE if any(took.get("beside_other_work") for took in known.values()) else "",
        NOT_LOOKED_FOR=NOT_LOOKED_FOR
        if any("noticed_seconds" not in took for took in known.values())
        else "",
    )


def text() -> str:
    known = measured.read(measured.ROWS)
    lines = [
        before(known)
        + "| fault | what happens | exit code | bound, s | noticed, s | ended, s | back, s | counted by |",
        "|---|---|---|---|---|---|---|---|",
        *(line(entry, known) for entry in ROWS),
    ]
    page = "\n".join(lines) + "\n"
    if plain := measured.read(measured.DEEPSPEED):
        page += DEEPSPEED
        for entry in plain.values():
            cells = (
                entry["signal"],
                entry["to"],
                entry["code"],
                seconds(entry["seconds"], mark_of(entry)),
                entry["left"],
            )
            page += "| " + " | ".join(map(str, cells)) + " |\n"
    if soak := measured.read(measured.SOAK):
        page += "\n## The soak\n\n" + soak["said"] + "\n\n" + OF_THE_SOAK
    return page + RESHARDING


def write() -> None:
    """Measurements of rows that are no more, or have another name now, are forgotten."""
    names = {entry.fault for entry in ROWS}
    known = measured.read(measured.ROWS)
    measured.write(measured.ROWS, {name: took for name, took in known.items() if name in names})
    README.write_text(text(), encoding="utf-8")
