"""What libraries leave out when they write a file: that it lasts, and that others may read it.

Called by local.py, and by whatever writes a run's or an export's files.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network mounts cannot sync a folder, and need not.
        if not (error.errno == errno.EINVAL and path.is_dir()):
            raise
    finally:
        os.close(descriptor)


def open_to_readers(path: Path) -> None:
    """Give `path` the mode it would have if it were plainly made: safetensors and mkdtemp close theirs to others."""
    denied = os.umask(0)  # the system tells it only while setting it
    os.umask(denied)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~denied)
