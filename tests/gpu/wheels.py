"""Fetch, where there is a package index, what a bare GPU machine lacks; torch, CUDA and numpy are taken to be there.

    python tests/gpu/wheels.py WHEELS                                         here: about 35 MB, for Python 3.12
    pip install --no-index --no-deps --target SITE WHEELS/*.whl               there, then
    PYTHONPATH=SITE python tests/gpu/run.py --out gpu.json

Versions are those of constraints.txt. DeepSpeed is published as source only, and is built into a wheel here, without
its CUDA extensions (ZeRO needs none of them), which takes an environment that has torch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
PYTHON = "3.12"
# pip takes a platform for exactly what it says
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
SOURCE_ONLY = ("deepspeed",)
# timm imports torchvision: one whose binary is for another torch than the machine's will do (see timm_side.py)
BINARY = """
    accelerate annotated-types boto3 botocore braceexpand certifi charset-normalizer einops hjson
    huggingface-hub idna jmespath msgpack ninja packaging pillow prometheus-client psutil py-cpuinfo pydantic
    pydantic-core python-dateutil pyyaml requests s3transfer safetensors six timm torchvision tqdm
    typing-extensions typing-inspection urllib3 webdataset
""".split()  # noqa: SIM905


def pinned() -> dict[str, str]:
    """{normalised name: requirement} of constraints.txt."""
    found = {}
    for line in CONSTRAINTS.read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line.strip()):
            found[re.sub(r"[-_.]+", "-", match.group(1)).lower()] = match.group(0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder for the wheels")
    parser.add_argument("--with", dest="more", nargs="*", default=[], help="further requirements")
    args = parser.parse_args()
    known = pinned()
    pip = [sys.executable, "-m", "pip"]
    where = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    wanted = [known.get(name, name) for name in BINARY]
    print(f"not in constraints.txt, the newest is taken: {[name for name in BINARY if name not in known]}")
    target = ["--implementation", "cp", "--python-version", PYTHON, *where]
    subprocess.run(
        [
            *pip,
            "download",
            "--no-deps",
            "--only-binary=:all:",
            *target,
            "--dest",
            str(args.out),
            *wanted,
            *args.more,
        ],
        check=True,
    )
    source_only = [known.get(name, name) for name in SOURCE_ONLY]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(args.out), *source_only],
        check=True,
        env={**os.environ, "DS_BUILD_OPS": "0"},
    )


if __name__ == "__main__":
    main()
