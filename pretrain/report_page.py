"""A run as one HTML file that needs no other: what it came to, curves, faults, data, recipe. Called by report.py."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.manifest import Manifest
from pretrain.curves import Curves
from pretrain.errors import UsageError
from pretrain.metrics.progress import format_duration

_MOST_EVENTS = 200
_MOST_CHECKPOINTS = 10
_MOST_CLASSES = 30
_GOOD, _BAD, _PLAIN = "good", "bad", ""

_STYLE = """
:root { --ink: #1c2430; --faint: #667080; --line: #dfe3e8; --good: #15803d; --bad: #b42318; --back: #f5f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 2px; }
h2 { font-size: 18px; margin: 38px 0 10px; }
.sub { color: var(--faint); overflow-wrap: anywhere; }
.badge { font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 99px; vertical-align: 5px; margin-left: 10px; color: #fff; background: #64748b; }
.badge.good { background: var(--good); } .badge.bad { background: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-top: 20px; }
.tile, figure, .card { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 11px 15px 12px; } .tile b { display: block; font-size: 23px; line-height: 1.3; font-weight: 650; }
.tile span { color: var(--faint); font-size: 13px; } .tile.bad b { color: var(--bad); } .tile.good b { color: var(--good); }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 12px; }
figure { margin: 0; padding: 8px; } figure img { width: 100%; display: block; }
.card { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 14px; border-bottom: 1px solid var(--line); vertical-align: top; font-variant-numeric: tabular-nums; }
td:last-child { overflow-wrap: anywhere; } .wide-last td:not(:last-child) { white-space: nowrap; } tr:last-child td { border-bottom: 0; }
.events td:not(:last-child) { white-space: nowrap; }
th { color: var(--faint); font-weight: 600; font-size: 13px; } td:first-child { white-space: nowrap; }
tr.bad td:nth-child(4) { color: var(--bad); font-weight: 600; } tr.good td:nth-child(4) { color: var(--good); font-weight: 600; }
pre { margin: 0; padding: 14px 18px; overflow-x: auto; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
p.none { color: var(--faint); margin: 0; }
@media (max-width: 520px) { .curves { grid-template-columns: 1fr; } }
"""  # noqa: E501


def write_page(
    out: Path,
    curves: Curves,
    *,
    table: Mapping[str, str],
    pictures: Mapping[str, bytes],
    records: Sequence[Mapping[str, Any]],
    attempts: Sequence[Mapping[str, Any]],
    manifest: Manifest | None,
    recipe: str | None,
) -> None:
    """table: what `pretrain report` prints. pictures: SVG by title. records: the journal's lines. manifest: of the
    newest checkpoint. recipe: RUN/config.yaml. Raises UsageError when the file cannot be written.
    """
    name = curves.run_dir.resolve().name
    state = ("finished", _GOOD) if curves.finished else ("not finished", _PLAIN)
    sections = [
        f'<h1>{_text(name)}<span class="badge {state[1]}">{state[0]}</span></h1>',
        f'<div class="sub">{_text(_when(records))}</div>',
        '<div class="tiles">' + "".join(_tile(*tile) for tile in tiles(curves, attempts)) + "</div>",
        _section("Curves", '<div class="curves">' + "".join(map(_figure, pictures.items())) + "</div>"),
        _section("Faults, restarts and rollbacks", _events(faults(records, attempts))),
        _section("Attempts", _table(_ATTEMPT_HEADER, attempt_rows(attempts, records), wide_last=True)),
        _section("In numbers", _table(None, [row for row in table.items() if not _is_of_an_attempt(row[0])])),
        _section("Data", _table(None, data_rows(manifest, records))),
        _section("Checkpoints", _table(_CHECKPOINT_HEADER, checkpoint_rows(records))),
        _section("Recipe", _recipe(recipe)),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--html {out}: cannot be written: {error.strerror or error}") from None


def tiles(curves: Curves, attempts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(value, what it is, good or bad): what is looked for first."""
    values, found = curves.values, []
    found.append((f"{curves.steps[-1]:,}", f"steps, {curves.samples[-1]:,} samples", _PLAIN))
    if (loss := _last(values.get("loss"))) is not None:
        found.append((f"{loss:.4g}", "loss, the last step's", _PLAIN))
    for name, (_, metric) in curves.validation.items():
        if (last := _last(metric)) is not None:
            shown = f"{last:.1%}" if name.endswith("top1") else f"{last:.4g}"  # beside probes' shares
            found.append((shown, f"validation {name}", _PLAIN))
    for name, (_, top1) in curves.probes.items():
        if (last := _last(top1)) is not None:
            fell = any(probe == name for _, probe, _ in curves.falls)
            found.append((f"{last:.1%}", f"probe {name}", _BAD if fell else _PLAIN))
    if (speed := _median(values.get("images_per_second"))) is not None:
        found.append((f"{speed:,.0f}", "images a second (median)", _PLAIN))
    if (utilization := _median(values.get("utilization"))) is not None:
        found.append((f"{utilization:.1%}", "model FLOPs utilisation (median)", _PLAIN))
    share = curves.effective.share
    found.append((f"{share:.1%}", "effective training time", _GOOD if share > 0.9 else _PLAIN))
    crashes = sum(attempt.get("exit_code") not in (0, 75, 130, None) for attempt in attempts)
    found.append((f"{len(attempts)}", f"attempts, {crashes} of them crashed", _BAD if crashes else _PLAIN))
    if curves.rollbacks:
        found.append((f"{len(curves.rollbacks)}", "rollbacks", _BAD))
    return found


def faults(
    records: Iterable[Mapping[str, Any]], attempts: Iterable[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], str, str]]:
    """(line of the journal or the end of an attempt, what it says, good or bad), in the order of time."""
    told = []
    for line in attempts:
        if line.get("exit_code") not in (0, 75, 130):  # a crash has no line in the journal
            code = (
                "with nobody left to say how"
                if line.get("exit_code") is None
                else f"with {line['exit_code']}"
            )
            lost = f"; {line['steps_lost']} steps lost" if line.get("steps_lost") else ""
            ended = {"event": "attempt_ended", "time": line.get("ended"), "attempt": line.get("attempt")}
            told.append(
                (ended | {"step": line.get("last_step")}, f"{code}: {line.get('reason')}{lost}", _BAD)
            )
    for record in records:
        say = _SAID.get(str(record.get("event")))
        if say is not None:
            told.append((dict(record), say(record), _TONES.get(str(record["event"]), _PLAIN)))
    return sorted(told, key=lambda one: float(one[0].get("time") or 0.0))


def _started(record: Mapping[str, Any]) -> str:
    ranks = f"{record.get('world_size', '?')} ranks, ZeRO {record.get('zero_stage', '?')}"
    if not record.get("resumed"):
        return f"begun on {ranks}"
    return f"goes on at step {int(record.get('step', 0)):,} on {ranks}"


def _changed(record: Mapping[str, Any]) -> str:
    changed = record.get("changed") or {}
    return "; ".join(
        f"{key}: {_json(of.get('before'))} → {_json(of.get('now'))}" for key, of in changed.items()
    )


_SAID: dict[str, Any] = {
    "start": _started,
    "config_changed": _changed,
    "fork": lambda r: f"from {r.get('parent')} at step {r.get('step')}",
    "stopped": lambda r: "asked to stop; saved" if r.get("step") else "asked to stop before the first step",
    "finished": lambda r: "at its last step",
    "step_skipped": lambda r: "a loss or gradient was not finite; the update was left out on all ranks",
    "rollback": lambda r: f"{r.get('reason')}; from step {r.get('from_step')} back to {r.get('step')}",
    "slow_rank": lambda r: (
        f"rank {r.get('rank')} on {r.get('host')}: {_number(r.get('seconds'))} s where the middle rank takes "
        f"{_number(r.get('others_seconds'))} s"
    ),
    "slow_rank_over": lambda r: f"rank {r.get('rank')} on {r.get('host')} is as fast as the others again",
    "watchdog": lambda r: (
        f"attempt {r.get('of_attempt')}, rank {r.get('rank')} on {r.get('host')}: {r.get('said')}"
    ),
    "checkpoint_failed": lambda r: str(r.get("reasons")),
    "checkpoint_rejected": lambda r: f"{Path(str(r.get('path'))).name}: {r.get('reason')}",
    "probe_falls": lambda r: f"{r.get('probe')} below its {r.get('below')}: {_number(r.get('top1'))}",
    "evaluation_given_up": lambda r: str(r.get("reason") or "stopped in the middle"),
    "tracker_failed": lambda r: f"{r.get('tracker')}: {r.get('reason')}",
    "overfit": lambda r: "one batch again and again",
}
_TONES = {
    **dict.fromkeys(("finished", "slow_rank_over"), _GOOD),
    **dict.fromkeys(
        (
            "step_skipped", "rollback", "slow_rank", "watchdog", "checkpoint_failed", "checkpoint_rejected",
            "probe_falls",
        ),
        _BAD,
    ),
}  # fmt: skip

_ATTEMPT_HEADER = (
    "attempt",
    "began (UTC)",
    "lasted",
    "steps",
    "ranks",
    "exit code",
    "steps lost",
    "why it ended",
)


def attempt_rows(
    attempts: Sequence[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]
) -> list[tuple[str, ...]]:
    ranks = {r.get("attempt"): r.get("world_size") for r in records if r.get("event") == "start"}
    rows: list[tuple[str, ...]] = []
    for line in attempts:
        first, last = line.get("first_step"), line.get("last_step")
        rows.append(
            (
                _or_dash(line.get("attempt")),
                _time(line.get("started")),
                format_duration(max(0.0, float(line["ended"]) - float(line["started"]))),
                "–" if first is None or last is None else f"{first:,} to {last:,}",
                _or_dash(line.get("world_size") or ranks.get(line.get("attempt"))),
                _or_dash(line.get("exit_code")),
                _or_dash(line.get("steps_lost")),
                _or_dash(line.get("reason")),
            )
        )
    return rows


def data_rows(manifest: Manifest | None, records: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Which data it was, as the newest checkpoint guards it; before there is one, as the journal has it."""
    rows: list[tuple[str, str]] = []
    segments: Sequence[Any] = []
    if manifest is not None:
        dataset, segments = manifest.dataset, manifest.segments
        rows = [
            ("where", str(dataset.get("url"))),
            ("identity (sha256)", str(dataset.get("identity"))),
            ("samples", f"{int(dataset.get('num_samples') or 0):,}"),
            ("classes", _classes(dataset)),
            ("order", _json(manifest.order)),
        ]
        if manifest.skipped:
            rows.append(("skipped intervals", _json(manifest.skipped)))
        rows.append(("software", ", ".join(f"{name} {of}" for name, of in manifest.software.items())))
    else:
        for record in records:
            segments = record.get("segments", segments) if record.get("event") == "data" else segments
    for number, segment in enumerate(segments, 1):
        rows.append((f"segment {number}", _json(segment)))
    return rows


_CHECKPOINT_HEADER = ("step", "committed (UTC)", "size", "from start to commit", "training stood still")


def checkpoint_rows(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The newest ones, newest first."""
    lines = [record for record in records if record.get("event") == "checkpoint"]
    return [
        (
            f"{int(line['step']):,}",
            _time(line.get("time")),
            f"{float(line.get('bytes') or 0) / 1e6:,.1f} MB",
            f"{_number(line.get('seconds'))} s",
            f"{_number(line.get('stall_seconds'))} s",
        )
        for line in lines[: -_MOST_CHECKPOINTS - 1 : -1]
    ]


def _is_of_an_attempt(name: str) -> bool:
    return name.startswith("attempt") and name.endswith("ended")


def _classes(dataset: Mapping[str, Any]) -> str:
    names = dataset.get("class_names")
    if not names:
        return _or_dash(dataset.get("num_classes"))
    more = f", and {len(names) - _MOST_CLASSES} more" if len(names) > _MOST_CLASSES else ""
    return f"{len(names)}: {', '.join(map(str, names[:_MOST_CLASSES]))}{more}"


def _events(told: Sequence[tuple[Mapping[str, Any], str, str]]) -> str:
    shown = told[-_MOST_EVENTS:]
    rows = [
        f'<tr class="{tone}">'
        + "".join(
            f"<td>{_text(cell)}</td>"
            for cell in (
                _time(record.get("time")),
                _or_dash(record.get("attempt")),
                f"{record['step']:,}" if isinstance(record.get("step"), int) else "–",
                str(record["event"]).replace("_", " "),
                said,
            )
        )
        + "</tr>"
        for record, said, tone in shown
    ]
    if not rows:
        return '<p class="none">None.</p>'
    header = "".join(f"<th>{cell}</th>" for cell in ("time (UTC)", "attempt", "step", "what", "in words"))
    left_out = len(told) - len(shown)
    note = f'<p class="none">{left_out} earlier ones are in journal.jsonl.</p>' if left_out else ""
    return f'{note}<div class="card"><table class="events"><tr>{header}</tr>{"".join(rows)}</table></div>'


def _recipe(recipe: str | None) -> str:
    if recipe is None:
        return '<p class="none">There is no config.yaml in the run\'s folder.</p>'
    return f'<div class="card"><pre>{_text(recipe)}</pre></div>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>\n{body}</section>"


def _tile(value: str, what: str, tone: str) -> str:
    return f'<div class="tile {tone}"><b>{_text(value)}</b><span>{_text(what)}</span></div>'


def _figure(picture: tuple[str, bytes]) -> str:
    title, svg = picture
    data = base64.b64encode(svg).decode("ascii")  # as an image: nothing in it is run, and no ids meet
    return f'<figure><img alt="{_text(title)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _table(header: Sequence[str] | None, rows: Sequence[Sequence[str]], *, wide_last: bool = False) -> str:
    """wide_last: only the last column's cells are broken into lines."""
    if not rows:
        return '<p class="none">None.</p>'
    head = "" if header is None else "<tr>" + "".join(f"<th>{_text(cell)}</th>" for cell in header) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="wide-last"' if wide_last else ""
    return f'<div class="card"><table{kind}>{head}{body}</table></div>'


def _when(records: Sequence[Mapping[str, Any]]) -> str:
    times = [float(record["time"]) for record in records if isinstance(record.get("time"), int | float)]
    return f"{_time(min(times))} to {_time(max(times))} UTC" if times else ""


def _time(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "–"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _last(values: np.ndarray | None) -> float | None:
    finite = np.array([]) if values is None else values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _median(values: np.ndarray | None) -> float | None:
    finite = np.array([]) if values is None else values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "?"


def _or_dash(value: Any) -> str:
    return "–" if value is None else str(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _text(value: str) -> str:
    return html.escape(value, quote=True)
