"""Two hosts with a cable that can be cut: network namespaces on a bridge in a third one. Needs root on Linux."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from services.required import skip_or_fail

NETWORK = "10.79.41"  # known only inside the namespaces


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class TwoHosts:
    """Hosts "h1" and "h2", with addresses of their own and those as their names."""

    names = ("h1", "h2")

    def __init__(self, mark: str) -> None:
        self._switch = f"{mark}-sw"
        self._spaces = {name: f"{mark}-{name}" for name in self.names}

    @staticmethod
    def address(name: str) -> str:
        return f"{NETWORK}.{TwoHosts.names.index(name) + 1}"

    def command(self, name: str, command: Sequence[str]) -> list[str]:
        """`command` as it is run on that host; it stays one process."""
        as_host = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', name]
        return ["ip", "netns", "exec", self._spaces[name], *as_host, *command]

    def cut(self) -> None:
        ip("-n", self._switch, "link", "set", "v2", "down")

    def mend(self) -> None:
        ip("-n", self._switch, "link", "set", "v2", "up")

    def _make(self) -> None:
        ip("netns", "add", self._switch)
        ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self._switch, "link", "set", "br0", "up")
        for number, (name, space) in enumerate(self._spaces.items(), start=1):
            ip("netns", "add", space)
            ip(
                "-n",
                self._switch,
                "link",
                "add",
                f"v{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            ip("-n", self._switch, "link", "set", f"v{number}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def _remove(self) -> None:
        for space in (self._switch, *self._spaces.values()):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Skips the test where there can be none."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        skip_or_fail("network namespaces need root, and the programs ip and unshare")
    hosts = TwoHosts(f"pw{uuid.uuid4().hex[:6]}")
    try:
        try:
            hosts._make()
        except subprocess.CalledProcessError as error:
            skip_or_fail(f"no network namespaces here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts._remove()
