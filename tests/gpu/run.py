"""What only a GPU can show, in under ten minutes, as JSON: numbers that agree, training that learns, speed.

    python tests/gpu/run.py --out gpu.json                     on a machine with CUDA, torch >= 2.10, Python 3.12
    python tests/gpu/run.py --out cpu.json --device cpu --small    the script's own logic, anywhere, in a minute

Each stage runs in a process of its own with its own time limit, so that one that fails or hangs loses nothing of the
others. Exit code 0: all of them passed. What a bare machine lacks comes as wheels: see tests/gpu/wheels.py. Compiling
needs a C compiler (Triton's launchers are built with it).
`--photographs FOLDER` (images, or indexed shards) trains on them where the machine has some; else on drawn images.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATASHEET_FLOPS = 989e12  # H100 and H200, bf16, dense

# name -> seconds that it may take. In the order of what would be missed most, for the budget may end first: together
# they are above it, so that a slow stage costs the last ones and not itself.
STAGES: dict[str, float] = {
    "machine": 60,
    "precision": 120,
    "zero": 150,
    "learns": 120,
    "speed vit_large_patch16 ours": 100,
    "speed vit_large_patch16 timm": 100,
    "speed mae_large_patch16 ours": 100,
    "speed mae_large_patch16 timm": 100,
    "speed vit_huge_patch14 ours": 120,
    "speed vit_huge_patch14 timm": 120,
    "speed vit_large_patch16 eager": 60,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and few steps")
    parser.add_argument("--photographs", type=folder, help="of images, or of indexed shards, to train on")
    parser.add_argument(
        "--only", action="append", metavar="STAGE", help="begins so; may be given several times"
    )
    parser.add_argument("--budget-seconds", type=float, default=570.0, help="for all stages together")
    args = parser.parse_args()
    chosen = [name for name in STAGES if not args.only or any(name.startswith(one) for one in args.only)]
    if not chosen:
        parser.error(f"--only {args.only}: there are {', '.join(STAGES)}")
    began, stages = time.monotonic(), {}
    for name in chosen:
        left = args.budget_seconds - (time.monotonic() - began)
        stages[name] = run_stage(name, args, seconds=min(STAGES[name], left))
        print(f"{name}: {said(stages[name])}", flush=True)
        write(args, stages, began)
    return 0 if all(stage["ok"] for stage in stages.values()) else 1


def folder(given: str) -> str:
    """The folder's absolute path: stages run in folders of their own."""
    if not Path(given).is_dir():
        raise argparse.ArgumentTypeError(f"{given} is not a folder")
    return str(Path(given).resolve())


def run_stage(name: str, args: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """{ok, seconds, result} or {ok, seconds, error}; its processes are gone afterwards."""
    if seconds <= 1:
        return {"ok": False, "seconds": 0.0, "error": "not run: the budget of time was spent"}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(ROOT / "tests" / "gpu" / "stages.py"), name, str(out)]
        command += ["--device", args.device, *(["--small"] if args.small else [])]
        command += ["--photographs", args.photographs] if args.photographs else []
        # A group of its own: a stage that hangs may have children, which must not outlive it.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path_for_children()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said_by_it, _ = process.communicate(timeout=seconds)
            error = None if process.returncode == 0 else f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said_by_it, _ = process.communicate()
            error = f"killed after {seconds:.0f} s"
        result = json.loads(out.read_text()) if out.is_file() else {}
    stage: dict[str, Any] = {"ok": error is None, "seconds": round(time.monotonic() - began, 1), **result}
    if error is not None:
        stage.setdefault("error", f"{error}: {said_by_it[-3000:]}")
    return stage


def path_for_children() -> str:
    """The checkout and its tests first; what was there (a folder of wheels' content) after them."""
    parts = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
    return os.pathsep.join(part for part in parts if part)


def write(args: argparse.Namespace, stages: dict[str, Any], began: float) -> None:
    """All that is known so far: a machine that is taken away leaves what it had."""
    machine = stages.get("machine", {}).get("result", {})
    summary = speeds(stages, machine.get("bf16_matmul_flops"))
    document = {
        "device": args.device,
        "small": args.small,
        "seconds": round(time.monotonic() - began, 1),
        "ok": all(stage["ok"] for stage in stages.values()),
        "machine": machine,
        "speed": summary,
        "stages": stages,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(args.out.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.replace(args.out)


def speeds(stages: dict[str, Any], matmul_flops: float | None) -> dict[str, Any]:
    """{network: {ours, timm, eager: {images_per_second, …}, ratio}} of the speed stages that came through."""
    table: dict[str, Any] = {}
    for name, stage in stages.items():
        if not name.startswith("speed ") or "result" not in stage:
            continue
        _, network, who = name.split()
        result = stage["result"]
        rate = result["images_per_second"] * result["training_flops"]
        table.setdefault(network, {})[who] = {
            **result,
            "utilisation_of_measured": rate / matmul_flops if matmul_flops else None,
            "utilisation_of_datasheet": rate / DATASHEET_FLOPS,
        }
    for row in table.values():
        if "ours" in row and "timm" in row:
            row["ours_over_timm"] = row["ours"]["images_per_second"] / row["timm"]["images_per_second"]
    return table


def said(stage: dict[str, Any]) -> str:
    """One line for whoever watches."""
    if not stage["ok"]:
        return f"FAILED after {stage['seconds']} s: {stage['error'].strip().splitlines()[-1]}"
    shown = {
        name: f"{value:.4g}"
        for name, value in stage.get("result", {}).items()
        if isinstance(value, int | float)
    }
    return f"ok in {stage['seconds']} s " + ", ".join(f"{name} {value}" for name, value in shown.items())


if __name__ == "__main__":
    sys.exit(main())
