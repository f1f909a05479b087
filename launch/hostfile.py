"""Read a hostfile in DeepSpeed's format: a line a host, `NAME slots=N`. Used by hosts.py."""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.errors import UsageError

_LINE = re.compile(r"(?P<host>[^\s#]+)\s+slots\s*=\s*(?P<slots>\d+)\s*(#.*)?")
_NAME = re.compile(r"[A-Za-z0-9_\[][A-Za-z0-9_.:@%\[\]-]*")  # nothing that ssh could take for an option


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes by host, in the file's order. Raises UsageError, naming the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--hostfile {path}: cannot be read: {error}; give a file of `NAME slots=N`"
        ) from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if not found or not _NAME.fullmatch(found["host"]) or int(found["slots"]) < 1:
            raise UsageError(
                f"{path}, line {number}: {line!r} is not `NAME slots=N` with N from 1 on; correct it"
            )
        if found["host"] in hosts:
            raise UsageError(
                f"{path}, line {number}: {found['host']} is named twice; give it once, with the sum of its slots"
            )
        hosts[found["host"]] = int(found["slots"])
    if not hosts:
        raise UsageError(f"{path}: names no host; give a line `NAME slots=N` for each")
    return hosts
