"""A host's devices and memory against what a recipe needs. Used by looks.py and probe.py, on each host.

Where there is no CUDA driver the ranks run on the CPU, and there is nothing to ask.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from launch.checks import CHECK_SECONDS, FAILED, OK, UNKNOWN, Check, Place, gb
from launch.cluster_model import RESERVE_BYTES
from pretrain.config.load import zero_stage
from pretrain.config.schema import RunConfig
from pretrain.cost import cost_of, state_of
from pretrain.derived import split_batch

MODEL_ERROR = 1.25  # by which the model of memory may be wrong; compiling, for one, keeps less
_DRIVER = Path("/proc/driver/nvidia/version")

# Asks the driver itself, in a process of its own: it honours CUDA_VISIBLE_DEVICES and needs no torch.
_DEVICES = """
import ctypes, json, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print("[]")
    sys.exit()
def must(error):
    if error:
        sys.exit(f"the CUDA driver gave error {error}")
count, device, size, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(100)
error = cuda.cuInit(0)
if error == 100:  # CUDA_ERROR_NO_DEVICE
    print("[]")
    sys.exit()
must(error or cuda.cuDeviceGetCount(ctypes.byref(count)))
found = []
for number in range(count.value):
    must(cuda.cuDeviceGet(ctypes.byref(device), number))
    must(cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device))
    must(cuda.cuDeviceGetName(name, 100, device))
    found.append({"name": name.value.decode(), "bytes": size.value})
print(json.dumps(found))
"""


def cuda_devices() -> list[dict[str, Any]]:
    """{name, bytes} of each. Raises OSError when there is a driver and it does not start."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _DEVICES], capture_output=True, text=True, timeout=CHECK_SECONDS
    )
    if result.returncode:
        raise OSError(result.stderr.strip())
    return json.loads(result.stdout)


def driver_version(text: str) -> str:
    """Of NVIDIA's kernel module, from what it says of itself; "" where that is something else."""
    found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def kinds() -> dict[str, Any]:
    """What findings.py compares between hosts. gpus: each one's name; None where they cannot be asked for."""
    try:
        gpus: list[str] | None = [device["name"] for device in cuda_devices()]
    except (OSError, subprocess.TimeoutExpired):  # the check of devices has said why
        gpus = None
    driver = ""
    with contextlib.suppress(OSError):
        driver = driver_version(_DRIVER.read_text())
    return {"gpus": gpus, "driver": driver}


def needed_bytes(config: RunConfig, world_size: int) -> float:
    """Memory that a rank fills by the model of cost.py, on a CPU without what CUDA and its libraries keep."""
    cost, split = cost_of(config, config.objective.num_classes), split_batch(config, world_size)
    state = state_of(
        config,
        cost,
        stage=zero_stage(config),
        world_size=world_size,
        accumulates=split.accumulation_steps > 1,
    )
    return state.total + split.micro_batch_size * cost.activation_bytes()


def devices(config: RunConfig, place: Place) -> Check:
    found, need = cuda_devices(), needed_bytes(config, place.world_size)
    if not found:
        free = available_memory()
        said = f"no CUDA device: {place.processes} rank(s) on the CPU, {gb(need)} each of {gb(free)} free"
        return fits(said, need * place.processes, free)
    if len(found) < place.processes:
        why = f"{place.processes} ranks, and {len(found)} CUDA device(s); correct the number of ranks of this host"
        return Check("devices", FAILED, why)
    least = min(found[: place.processes], key=lambda device: device["bytes"])
    need += RESERVE_BYTES
    said = f"{len(found)} x {least['name']}, a rank fills {gb(need)} of {gb(least['bytes'])} by a model"
    return fits(said, need, least["bytes"])


def fits(said: str, need: float, there: float) -> Check:
    """Too much by far fails; a little too much is for the run to show, as a model may be wrong by that."""
    advice = (
        "take a smaller train.micro_batch_size, more ranks, or a higher deepspeed.zero_optimization.stage"
    )
    if need > MODEL_ERROR * there:
        return Check("devices", FAILED, f"{said}: too much; {advice}")
    if need > there:
        return Check("devices", UNKNOWN, f"{said}: perhaps too much; if it is, {advice}")
    return Check("devices", OK, said)


def available_memory() -> int:
    """Bytes that this process's host, or its container, has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(0, free)
