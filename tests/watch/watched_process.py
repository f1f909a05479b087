"""A process that is watched as a rank is, without the weight of one: `python watched_process.py SETTINGS PROGRAM`.

PROGRAM is Python that finds `pulse`, `hang()` and `hold()`; it is run with the process watched as
SETTINGS (JSON: rank, hosts, folder, step_seconds, start_seconds) say.
"""

import ctypes
import json
import os
import sys
import threading
from pathlib import Path

from pretrain.pulse import Pulse


def hang() -> None:
    """Wait for nothing, as Python does it."""
    threading.Event().wait()


def hold() -> None:
    """Wait for nothing in native code that keeps the interpreter's lock, and that no signal brings back."""
    reader, _ = os.pipe()
    ctypes.PyDLL(None).read(reader, ctypes.create_string_buffer(1), 1)


def wait_in_collective() -> None:
    """Wait where the stack looks like torch's communication."""
    code = "import threading\ndef all_reduce():\n    threading.Event().wait()\n"
    names: dict = {}
    exec(compile(code, "/site-packages/torch/distributed/distributed_c10d.py", "exec"), names)
    names["all_reduce"]()


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    pulse = Pulse()
    pulse.watch(Path(settings.pop("folder")), **settings)
    pulse.at("start", 0)
    pulse.at("data", 1)
    print("watched", flush=True)
    exec(sys.argv[2])
