"""What a preflight has found: comparing hosts, and the table. Used by preflight.py; pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.checks import FAILED, OK, WARNING

CLOCK_SECONDS = 5.0  # logs of hosts are read side by side
STORE_CLOCK_SECONDS = 300.0  # S3 refuses signatures from 15 minutes on, and a clock that runs away goes on
_NAMES_SHOWN = 4


@dataclass(frozen=True)
class Finding:
    """One check on one host; host "" is for what is of all together."""

    check: str
    host: str
    status: str
    said: str


def odd_ones(values: Mapping[str, Hashable]) -> tuple[Hashable, dict[str, Hashable]]:
    """The value that most hosts have (of as many, the first host's), and the hosts that have another."""
    order = list(values.values())
    common = max(Counter(order).items(), key=lambda item: (item[1], -order.index(item[0])))[0]
    return common, {host: value for host, value in values.items() if value != common}


def compare_versions(looks: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """looks: what each host said of itself. The same versions everywhere, nothing missing, and one checkout."""
    findings = []
    names = next(iter(looks.values()))["versions"]
    wrong: dict[str, list[str]] = {host: [] for host in looks}
    for name in names:
        common, odd = odd_ones({host: each["versions"].get(name, "") for host, each in looks.items()})
        for host, version in odd.items():
            wrong[host].append(f"{name} is {version or 'not there'}, elsewhere {common or 'not there'}")
        if not common:
            for host in looks.keys() - odd.keys():
                wrong[host].append(f"{name} is not installed")
    common, odd = odd_ones({host: each["code"] for host, each in looks.items()})
    for host, code in odd.items():
        wrong[host].append(f"its copy of this project is {code}, elsewhere {common}")
    for host, each in looks.items():
        if wrong[host]:
            advice = "install what constraints.txt says, and the same checkout, on all hosts"
            findings.append(Finding("packages", host, FAILED, f"{'; '.join(wrong[host])}; {advice}"))
        else:
            shown = ", ".join(f"{name} {each['versions'][name]}" for name in ("python", "torch", "deepspeed"))
            findings.append(Finding("packages", host, OK, f"{shown}, code {each['code']}"))
    return findings


def compare_devices(looks: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """GPUs on all hosts or on none; of one kind, under one driver. Nothing to say where there are none."""
    kinds = {
        host: tuple(sorted(set(each["gpus"]))) for host, each in looks.items() if each["gpus"] is not None
    }
    if not any(kinds.values()):
        return []
    common = odd_ones({host: kind for host, kind in kinds.items() if kind})[0]
    driver, other_drivers = odd_ones(
        {host: each["driver"] for host, each in looks.items() if kinds.get(host)}
    )
    shown = {host: " and ".join(kind) for host, kind in kinds.items()}
    usual = next(shown[host] for host, kind in kinds.items() if kind == common)
    findings = []
    for host, kind in kinds.items():
        if not kind:
            why = f"no CUDA device, elsewhere {usual}; see nvidia-smi there, or leave the host out"
            findings.append(Finding("GPUs", host, FAILED, why))
        elif kind != common:
            why = f"{shown[host]}, elsewhere {usual}: all wait for the slowest, and memory is as the smallest has it"
            findings.append(Finding("GPUs", host, WARNING, why))
        elif host in other_drivers:
            why = f"driver {other_drivers[host] or 'unknown'}, elsewhere {driver or 'unknown'}; give all the same"
            findings.append(Finding("GPUs", host, WARNING, why))
        else:
            findings.append(Finding("GPUs", host, OK, f"{shown[host]}, driver {driver or 'unknown'}"))
    return findings


def compare_recipes(looks: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    read = {host: each["recipe"] for host, each in looks.items() if each["recipe"]}
    odd = odd_ones(read)[1] if read else {}
    findings = []
    for host, each in looks.items():
        if not each["recipe"]:
            findings.append(Finding("recipe", host, FAILED, str(each["why"])))
        elif host in odd:
            why = "is not what the other hosts have; give all the same file"
            findings.append(Finding("recipe", host, FAILED, why))
        else:
            findings.append(Finding("recipe", host, OK, f"parses, {each['recipe'][:12]}"))
    return findings


def compare_clocks(offsets: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """offsets: seconds that each host's clock is before ours, and how far off that may be."""
    middle = statistics.median([0.0, *(offset for offset, _ in offsets.values())])
    findings = []
    for host, (offset, within) in offsets.items():
        off = offset - middle
        if abs(off) - within > CLOCK_SECONDS:
            why = f"{abs(off):,.1f} s {'ahead of' if off > 0 else 'behind'} the others; set it, and let NTP keep it"
            findings.append(Finding("clock", host, FAILED, why))
        else:
            findings.append(Finding("clock", host, OK, "agrees within 5 s"))
    return findings


def judge_store_clocks(looks: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Each host's clock against that of the store it asked; nothing of hosts that asked none."""
    findings = []
    for host, each in looks.items():
        if not (clock := each.get("store_clock")):
            continue
        off = abs(clock["offset"]) - clock["within"]
        way = "ahead of" if clock["offset"] > 0 else "behind"
        said = f"{abs(clock['offset']):,.0f} s {way} {clock['store']}"
        if off > STORE_CLOCK_SECONDS:
            why = f"{said}, which refuses requests from 900 s on; set it, and let NTP keep it"
            findings.append(Finding("store's clock", host, FAILED, why))
        elif off > CLOCK_SECONDS:
            findings.append(Finding("store's clock", host, WARNING, f"{said}; let NTP keep it"))
        else:
            findings.append(Finding("store's clock", host, OK, f"agrees with {clock['store']} within 5 s"))
    return findings


def judge_folder(run_dir: str, writer: str, sees: Mapping[str, bool], *, mirror: str | None) -> list[Finding]:
    """sees: whether each host sees what `writer` wrote into the run's folder; the same rule as at a run's start."""
    blind = [host for host, seen in sees.items() if not seen]
    if not blind:
        only = len(sees) == 1
        said = "on this host" if only else f"{run_dir}: one folder for all hosts"
        return [Finding("shared folder", "", OK, said)]
    if mirror is not None:
        return [Finding("shared folder", "", OK, f"each host has its own {run_dir}; {mirror} is the judge")]
    why = f"does not see what {writer} writes to {run_dir}; take a folder that all share, or set checkpoint.mirror=s3://…"
    return [Finding("shared folder", host, FAILED, why) for host in blind]


def judge_space(
    looks: Mapping[str, Mapping[str, Any]], *, checkpoint_bytes: float, keep_last: int, is_shared: bool
) -> list[Finding]:
    """Room for the checkpoints that are kept, and one that is being written. Without a shared folder a host holds its
    own ranks' part only.
    """
    part = checkpoint_bytes if is_shared else checkpoint_bytes / len(looks)
    findings = []
    for host, each in looks.items():
        if "free_bytes" not in each:
            continue
        need, free = max(1, keep_last + 1 - each["kept"]) * part, each["free_bytes"]
        if free < need:
            why = f"{free / 1e9:,.1f} GB free, {need / 1e9:,.1f} GB of checkpoints to come; free some, or keep fewer"
            findings.append(Finding("free space", host, FAILED, why))
        else:
            said = f"enough for {need / 1e9:,.1f} GB of checkpoints"
            findings.append(Finding("free space", host, OK, said))
    return findings


def table(findings: Sequence[Finding], hosts: Sequence[str]) -> str:
    """A line for each check and what is the same on several hosts; what failed is marked."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for one in findings:
        grouped.setdefault((one.check, one.status, one.said), []).append(one.host)
    rows = [("check", "hosts", "status", "")]
    for (check, status, said), of in grouped.items():
        rows.append((check, _names(of, hosts), status.upper() if status == FAILED else status, said))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def _names(of: Sequence[str], hosts: Sequence[str]) -> str:
    if of == [""] or (len(of) == len(hosts) > 1):
        return "all"
    if len(of) > _NAMES_SHOWN:
        return f"{', '.join(of[: _NAMES_SHOWN - 1])} … {of[-1]} ({len(of)})"
    return ", ".join(of)
