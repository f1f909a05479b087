"""What is promised of files that libraries wrote."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pretrain.storage.files import open_to_readers, sync


def test_a_folder_whose_file_system_cannot_sync_one_is_let_be_and_a_file_is_not() -> None:
    sync(Path("/proc"))
    with pytest.raises(OSError) as caught:
        sync(Path("/proc/version"))
    assert caught.value.errno == errno.EINVAL


def test_what_was_made_in_private_gets_the_mode_of_what_is_plainly_made(tmp_path: Path) -> None:
    private, plain = tmp_path / "private", tmp_path / "plain"
    private.mkdir(mode=0o700)
    (private / "file").touch(mode=0o600)
    before = os.umask(0o027)
    try:
        plain.mkdir()
        (plain / "file").touch()
        open_to_readers(private)
        open_to_readers(private / "file")
        assert os.umask(0o027) == 0o027, "it is left as it was"
    finally:
        os.umask(before)
    for name in (".", "file"):
        assert (private / name).stat().st_mode == (plain / name).stat().st_mode
