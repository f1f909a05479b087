"""A bucket in the network of the hosts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launching import ROOT, clean_environment
from services.radosgw import missing_binaries
from services.required import skip_or_fail
from services.ssh_hosts import NETWORK, Hosts

BUCKET = "mine"
SERVER = ROOT / "tests" / "services" / "radosgw.py"


@contextmanager
def bucket_in(hosts: Hosts, folder: Path) -> Iterator[dict[str, str]]:
    """Ceph's radosgw at the hosts' switch; the variables by which they find it."""
    if missing := missing_binaries():
        skip_or_fail(f"the S3 server is not installed: {', '.join(missing)}")
    words = [str(SERVER), "--serve", str(folder), "--bucket", BUCKET, "--host", f"{NETWORK}.254"]
    with (folder.parent / "radosgw.log").open("w") as log:
        server = subprocess.Popen(
            hosts.outside([sys.executable, *words]),
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        variables = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        assert server.stdout is not None
        for line in server.stdout:
            if not line.startswith("export "):
                break
            name, _, value = line.removeprefix("export ").strip().partition("=")
            variables[name] = value
        assert "AWS_ENDPOINT_URL" in variables, (folder.parent / "radosgw.log").read_text()
        yield variables
    finally:
        server.terminate()
        server.wait(30)
