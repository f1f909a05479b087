"""What can go wrong, and the exit code each kind ends a process with.

A message says the problem, what was got, and what to do next. Every error is built from one
string, so that it survives the trip from a loader worker to its parent process.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import tempfile
from collections.abc import Callable

EXIT_FINISHED = 0
EXIT_CRASHED = 1
EXIT_INTERRUPTED = 75
EXIT_CTRL_C = 130
EXIT_BROKEN_PIPE = 141  # as a shell says of SIGPIPE


class PretrainError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = EXIT_CRASHED


class UsageError(PretrainError):
    """Wrong usage, or something named on the command line that is not there. Not restarted."""

    exit_code = 2


class ConfigError(UsageError):
    """The recipe or an override is wrong. Raised before anything is written or joined."""


class DataError(PretrainError):
    """Data cannot be trusted, or is gone. Not restarted."""

    exit_code = 3


class StorageError(DataError):
    """A store did not give what was asked for, after retries."""


class ObjectChangedError(StorageError):
    """The store says that the object became another one while it was read."""


class ObjectNotFoundError(StorageError):
    """The bucket, folder or object does not exist."""


class AccessDeniedError(StorageError):
    """The store refused the credentials."""


class CheckpointError(PretrainError):
    """A checkpoint cannot be trusted, or does not fit this run. Not restarted."""

    exit_code = 4


class CheckpointMismatchError(CheckpointError):
    """A sound checkpoint, but of another run: going back to an older one would not help."""


class LostPeerError(PretrainError):
    """Another rank is gone: the cause is there, not here. The run may be restarted."""


class AskedToStopError(PretrainError):
    """What was under way is given up, because somebody asked the run to stop. Caught by who began it."""


class WorkerError(PretrainError):
    """A loader worker died or hung, again after it was started again. The run may be restarted."""


_SOCKET_PATH_TOO_LONG = "AF_UNIX path too long"


def exit_code_of(command: str, run: Callable[[], int]) -> int:
    """What `run()` returns. A user's error, Ctrl-C and a full disk are said in a line, and give their exit code."""
    try:
        return run()
    except PretrainError as error:
        print(f"pretrain {command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"pretrain {command}: stopped by Ctrl-C", file=sys.stderr)
        return EXIT_CTRL_C
    except OSError as error:
        if str(error) == _SOCKET_PATH_TOO_LONG:  # it has no number
            print(
                f"pretrain {command}: the folder of temporary files, {tempfile.gettempdir()}, has too long a name for "
                "the sockets of processes; set TMPDIR to one of 70 letters at most",
                file=sys.stderr,
            )
            return UsageError.exit_code
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"pretrain {command}: {error.strerror}; free some space, also in {tempfile.gettempdir()}, where temporary "
            "files go (TMPDIR names another place)",
            file=sys.stderr,
        )
        return EXIT_CRASHED


def exit_code_kept(code: int) -> int:
    """`code`; a process that a launcher started as a rank ends here and now with it.

    torch's threads outlive the groups of ranks, and one of them aborts the process now and then while Python takes
    itself apart: a run that finished would end with SIGABRT's code.
    """
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return code
    try:
        atexit._run_exitfuncs()  # private; multiprocessing has its workers and temporary folders end there
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # the reader of our output may be gone, or the disk it goes to full
        os._exit(code)
