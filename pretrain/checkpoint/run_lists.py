"""The lists that a run's folder holds for good, as JSON of a version: what was skipped, distrusted, changed.

Called by skipped.py, distrusted.py and segments.py, which say what stands in them. Imports no torch and no numpy:
checkpoint writers read such lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pretrain.checkpoint.run_directory import write_whole
from pretrain.errors import CheckpointError

FORMAT_VERSION = 1

T = TypeVar("T")


def read_list(
    path: Path, key: str, parse: Callable[[Any], tuple[T, ...]], *, if_damaged: str
) -> tuple[T, ...]:
    """What `parse` makes of the records under `key`; nothing where there is no such file.

    Raises CheckpointError, which ends with `if_damaged`, for a file that cannot be read, or that `parse` cannot take.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: is of format {body['format_version']}, this version reads {FORMAT_VERSION}; "
                "use the version of this project that wrote it"
            )
        return parse(body[key])
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {type(error).__name__} {error}; {if_damaged}"
        ) from None


def write_list(path: Path, key: str, records: Iterable[dict[str, Any]]) -> None:
    """Whole or not at all. Raises PretrainError."""
    body = {"format_version": FORMAT_VERSION, key: list(records)}
    write_whole(path, json.dumps(body, indent=1).encode() + b"\n")
