"""Write tests/faults/README.md: the rows, with what was measured. Called by __main__.py; a test holds it true."""

from __future__ import annotations

from pathlib import Path

from faults.matrix import measured
from faults.matrix.row import Entry
from faults.matrix.rows import ROWS
from faults.matrix.runs import BATCH, SAVE_EVERY, STEPS

README = Path(__file__).resolve().parent.parent / "README.md"

BEFORE = f"""# The fault matrix

What happens to a run when something goes wrong. Each row is a test of real processes: a small ViT in float32 on two
to eight gloo ranks under `pretrain launch local`, {STEPS} steps of {BATCH} images, a checkpoint every {SAVE_EVERY}. A
fault strikes; the run goes on, or the attempt ends with the exit code and within the bound below and the run is
started again: after 1, and after a 75 that nobody asked the supervisor for, by the supervisor itself (`--max-restarts`
is 3, as by default); where that was killed or told to stop, or where a cause had to be removed first, by hand, as a
scheduler would. In the end it must be the run that nothing happened to:

- on as many ranks weights, moments and every loss are bitwise those of the uninterrupted reference run; on other
  numbers of ranks the state is bitwise the same when loaded and ten losses agree within 1e-5;
- every checkpoint that is listed verifies;
- no process is left, and no unfinished file;
- what should count the fault counted it.

`make faults` plays all rows and writes this page; `PYTHONPATH=.:tests python -m faults.matrix --only WORDS` plays some.
Times are seconds from the fault on, one measurement each, on two shared cores. *Ended*: until the last process
of the attempt was gone. *Back*: until the run was beyond where it had been; of a restart most is imports, about
ten seconds there. A row without times is still to be measured.

"""

DEEPSPEED = """
## The same signals, plain `deepspeed`

The same run as `deepspeed --num_gpus 2 --module pretrain.train …`. *Left*: processes of the run still alive 20 s
after the launcher had ended (or after the signal, where it had not).

| signal | to | `deepspeed` ends with | after, s | left |
|---|---|---|---|---|
"""


def seconds(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else ""


def line(entry: Entry, known: dict[str, dict[str, object]]) -> str:
    took = known.get(entry.fault, {})
    code = "goes on" if entry.code == 0 else str(entry.code)
    cells = (
        entry.fault,
        entry.outcome,
        code,
        f"{entry.bound_seconds:g}",
        seconds(took.get("ended_seconds")),
        seconds(took.get("recovered_seconds")),
        str(entry.counted or ""),
    )
    return "| " + " | ".join(cells) + " |"


def text() -> str:
    known = measured.read(measured.ROWS)
    lines = [
        BEFORE + "| fault | what happens | exit code | bound, s | ended, s | back, s | counted by |",
        "|---|---|---|---|---|---|---|",
        *(line(entry, known) for entry in ROWS),
    ]
    page = "\n".join(lines) + "\n"
    if plain := measured.read(measured.DEEPSPEED):
        page += DEEPSPEED
        for entry in plain.values():
            cells = (entry["signal"], entry["to"], entry["code"], seconds(entry["seconds"]), entry["left"])
            page += "| " + " | ".join(map(str, cells)) + " |\n"
    if soak := measured.read(measured.SOAK):
        page += "\n## The soak\n\n" + soak["said"] + "\n"
    return page


def write() -> None:
    """Measurements of rows that are no more, or have another name now, are forgotten."""
    names = {entry.fault for entry in ROWS}
    known = measured.read(measured.ROWS)
    measured.write(measured.ROWS, {name: took for name, took in known.items() if name in names})
    README.write_text(text(), encoding="utf-8")
