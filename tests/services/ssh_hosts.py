"""Several hosts on this machine: a network namespace each, with a name, an address and an sshd of its own.

Used by tests through `Hosts`; needs root. They share the file system, as hosts with a shared folder do. Debian:
apt-get install --no-install-recommends openssh-server openssh-client iproute2
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

BINARIES = ("ip", "ssh", "ssh-keygen", "unshare")
SSHD = "/usr/sbin/sshd"  # it wants to be started by its full path
NETWORK = "10.213.77"  # exists inside the namespaces only


def unavailable() -> str | None:
    """Why hosts cannot be had here, None when they can."""
    missing = [name for name in BINARIES if shutil.which(name) is None]
    if not Path(SSHD).exists():
        missing.append("sshd")
    if missing:
        return f"hosts over ssh need {', '.join(missing)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"vp{os.getpid()}x"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Hosts:
    """`count` hosts, h0, h1, …, and `outside`, where commands are typed. A context: all is gone after it."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.names = [f"h{number}" for number in range(count)]
        self._prefix = f"vp{os.getpid()}"
        self._switch = f"{self._prefix}s"
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        Path("/run/sshd").mkdir(exist_ok=True)
        self._make_keys()
        try:
            self._make_switch()
            for number, name in enumerate(self.names):
                self._make_host(number, name)
            for name in self.names:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.kill(name)
        for namespace in (*map(self.namespace, self.names), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
            shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)

    def namespace(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def address(self, name: str) -> str:
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def outside(self, command: Sequence[str]) -> list[str]:
        """`command`, as typed on a machine that reaches all hosts by their names."""
        return ["ip", "netns", "exec", self._switch, *command]

    @property
    def ssh(self) -> str:
        return f"ssh -F {self.folder / 'ssh_config'}"

    def start(self, name: str) -> None:
        """Its sshd; returns once it listens."""
        options = {
            "ListenAddress": self.address(name),
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "key.pub",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "StrictModes": "no",
            "PidFile": "none",
        }
        words = " ".join(f"-o {key}={value}" for key, value in options.items())
        script = f"hostname {name} && exec {SSHD} -D -e -f /dev/null {words}"
        with (self.folder / f"sshd-{name}.log").open(
            "ab"
        ) as log:  # a pipe of ours would keep its reader waiting
            self._sshd[name] = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(name), "unshare", "--uts", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        while subprocess.run(self.outside([*self.ssh.split(), name, "true"]), capture_output=True).returncode:
            assert time.monotonic() < deadline, (self.folder / f"sshd-{name}.log").read_text()
            time.sleep(0.1)

    def pids(self, name: str) -> list[int]:
        """Of all processes on the host."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def kill(self, name: str) -> None:
        """The host is gone, at once and with all that ran on it."""
        self.cut(name)  # a dead machine says no good-bye
        while pids := self.pids(name):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        if name in self._sshd:
            self._sshd.pop(name).wait()

    def cut(self, name: str) -> None:
        """Take its network cable out."""
        self._ip("-n", self._switch, "link", "set", f"v{name}", "down", check=False)

    def mend(self, name: str) -> None:
        self._ip("-n", self._switch, "link", "set", f"v{name}", "up")

    def _make_keys(self) -> None:
        for key in ("key", "host_key"):
            path = self.folder / key
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        settings = {
            "IdentityFile": self.folder / "key",
            "UserKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "LogLevel": "ERROR",
            "BatchMode": "yes",
            "ConnectTimeout": "2",
            "ServerAliveInterval": "2",
            "ServerAliveCountMax": "2",
        }
        text = "\n".join(f"  {key} {value}" for key, value in settings.items())
        (self.folder / "ssh_config").write_text(f"Host *\n{text}\n")

    def _make_switch(self) -> None:
        self._make_namespace(self._switch)
        self._ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        self._ip("-n", self._switch, "addr", "add", f"{NETWORK}.254/24", "dev", "switch")
        self._ip("-n", self._switch, "link", "set", "switch", "up")

    def _make_host(self, number: int, name: str) -> None:
        namespace = self.namespace(name)
        self._make_namespace(namespace)
        self._ip(
            "-n",
            self._switch,
            "link",
            "add",
            f"v{name}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            namespace,
        )
        self._ip("-n", self._switch, "link", "set", f"v{name}", "master", "switch", "up")
        self._ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        self._ip("-n", namespace, "link", "set", "eth0", "up")

    def _make_namespace(self, namespace: str) -> None:
        self._ip("netns", "add", namespace)
        self._ip("-n", namespace, "link", "set", "lo", "up")
        folder = Path("/etc/netns") / namespace  # `ip netns exec` shows it there as /etc
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

    def _ip(self, *words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)
