"""Ceph's own S3 server on loopback: one monitor, one memory-backed OSD, one radosgw, all in one folder.

Used by tests through the `s3_server` fixture, and by hand:

    python tests/services/radosgw.py --serve DIR --bucket mine

which prints the environment that points boto3 and this project at it, and stops on Ctrl-C.
Debian: apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

BINARIES = (
    "ceph",
    "ceph-authtool",
    "ceph-mon",
    "ceph-osd",
    "monmaptool",
    "radosgw",
    "radosgw-admin",
    "setpriv",
)
REGION = "us-east-1"

CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:{host}:{mon_port}/0]
ms bind msgr1 = false
public addr = {host}
cluster addr = {host}
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/$name.keyring
run dir = {folder}
pid file =
admin socket =
log file = {folder}/$name.log
crash dir = {folder}/crash
mon cluster log file = {folder}/cluster.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
[mon]
mon data = {folder}/mon
mon initial members = a
mon data avail crit = 1
mon data avail warn = 2
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = {store_bytes}
osd memory target = 1073741824
osd client watch timeout = 8
[client.rgw]
rgw run sync thread = false
rgw enable usage log = false
rgw enable ops log = false
"""


class Keys(NamedTuple):
    access_key: str
    secret_key: str


def missing_binaries() -> list[str]:
    """The programs this needs that are not on the PATH."""
    return [name for name in BINARIES if shutil.which(name) is None]


def _free_port(host: str) -> int:
    with socket.socket() as each:
        each.bind((host, 0))
        return int(each.getsockname()[1])


class Radosgw:
    """A radosgw that lives between `start()` and `stop()`; about 12 s to start and 1 GB of memory."""

    def __init__(
        self, *, folder: Path | None = None, host: str = "127.0.0.1", store_bytes: int = 4 << 30
    ) -> None:
        self.folder = Path(folder) if folder else Path(tempfile.mkdtemp(prefix="radosgw-"))
        self._owns_folder = folder is None
        self.host = host
        self.access_key = "A" + secrets.token_hex(9).upper()
        self.secret_key = secrets.token_urlsafe(30)
        self._store_bytes = store_bytes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = 0

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    def environment(self, keys: Keys | None = None) -> dict[str, str]:
        """The variables by which boto3 finds this server, and nothing else."""
        access_key, secret_key = keys or Keys(self.access_key, self.secret_key)
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": access_key,
            "AWS_SECRET_ACCESS_KEY": secret_key,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self, timeout_seconds: float = 120.0) -> Radosgw:
        """Start the three daemons and make the first user. Whatever fails, nothing is left running."""
        try:
            self._start(time.monotonic() + timeout_seconds)
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self, deadline: float) -> None:
        folder = self.folder
        for name in ("", "mon", "osd", "crash"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        mon_port = _free_port(self.host)
        fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        (folder / "ceph.conf").write_text(
            CONFIG.format(
                fsid=fsid,
                host=self.host,
                folder=folder,
                mon_port=mon_port,
                store_bytes=self._store_bytes,
            )
        )
        mon_keyring = folder / "mon.keyring"
        admin_keyring = folder / "client.admin.keyring"
        admin_caps = [part for each in ("mon", "osd", "mds", "mgr") for part in ("--cap", each, "allow *")]
        self._run("ceph-authtool", "-C", admin_keyring, "--gen-key", "-n", "client.admin", *admin_caps)
        self._run("ceph-authtool", "-C", mon_keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        self._run("ceph-authtool", mon_keyring, "--import-keyring", admin_keyring)
        monmap = folder / "monmap"
        address = f"[v2:{self.host}:{mon_port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", mon_keyring)
        self._spawn("ceph-mon", "-f", "-i", "a")

        self._run("ceph", "osd", "new", osd_id, deadline=deadline)
        for name, caps in (
            ("osd.0", ["mon", "allow profile osd", "osd", "allow *"]),
            ("client.rgw", ["mon", "allow rw", "osd", "allow rwx"]),
        ):
            self._run("ceph", "auth", "get-or-create", name, *caps, "-o", folder / f"{name}.keyring")
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", osd_id)
        self._spawn("ceph-osd", "-f", "-i", "0")
        self._port = _free_port(self.host)  # chosen late, so that nobody takes it meanwhile
        self._start_gateway(deadline)
        self._create_user("pretrain", Keys(self.access_key, self.secret_key))

    def _start_gateway(self, deadline: float) -> None:
        # Without tcp_nodelay a small answer waits 40 ms for the acknowledgement of its own header.
        frontend = f"beast endpoint={self.host}:{self._port} tcp_nodelay=1"
        self._spawn("radosgw", "-f", "-n", "client.rgw", "--rgw-zone", "default", "--rgw-frontends", frontend)
        self._wait_until_it_answers(deadline)

    def kill_gateway(self) -> None:
        """End radosgw as a crash would. What it stored is in the OSD, and stays."""
        gateway = self._processes.pop()
        gateway.kill()
        gateway.wait()

    def restart_gateway(self, timeout_seconds: float = 60.0) -> None:
        """Start it again after `kill_gateway`, on the same port."""
        self._start_gateway(time.monotonic() + timeout_seconds)

    def gets(self, bucket: str) -> list[int]:
        """The bytes of each GET of an object in the bucket that the server has answered, by its own log."""
        line = re.compile(rf'beast: .* "GET /{bucket}/[^" ?]+ HTTP/1.1" 20[06] (\d+) ')
        before = -1
        while True:  # the log is written a moment later
            text = (self.folder / "client.rgw.log").read_text(errors="replace")
            found = [int(match[1]) for match in line.finditer(text)]
            if len(found) == before:
                return found
            before = len(found)
            time.sleep(0.5)

    def client(self) -> Any:
        """A boto3 client of the first user, for what a test sets up behind the back of what it tests."""
        import boto3  # here, so that serving needs nothing but Ceph

        session = boto3.session.Session(self.access_key, self.secret_key, region_name=REGION)
        return session.client("s3", endpoint_url=self.endpoint)

    def make_bucket(self, bucket: str) -> None:
        self.client().create_bucket(Bucket=bucket)

    def make_user(self, name: str) -> Keys:
        """A new user who owns no bucket and may read none until a bucket's policy says so."""
        keys = Keys("B" + secrets.token_hex(9).upper(), secrets.token_urlsafe(30))
        self._create_user(name, keys)
        return keys

    def read_only_user(self, bucket: str, name: str | None = None) -> Keys:
        """A new user who may list and read `bucket`, by a policy put on it, and not write."""
        name = name or f"reader-{secrets.token_hex(4)}"
        keys = self.make_user(name)
        statement = {
            "Effect": "Allow",
            "Principal": {"AWS": [f"arn:aws:iam:::user/{name}"]},
            "Action": ["s3:ListBucket", "s3:GetObject"],
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        self.client().put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        return keys

    def stop(self) -> None:
        """End the daemons by their process ids, last started first, and drop the folder if it is ours."""
        # radosgw first: without its OSD it would wait for minutes. The data are in memory: nothing to flush.
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=3)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._processes.clear()
        if self._owns_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _create_user(self, name: str, keys: Keys) -> None:
        self._run(
            "radosgw-admin", "-n", "client.rgw", "--rgw-zone", "default", "user", "create",
            "--uid", name, "--display-name", name, "--access-key", keys.access_key,
            "--secret-key", keys.secret_key,
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _run(self, *command: str | Path, deadline: float | None = None) -> str:
        timeout = 60.0 if deadline is None else max(1.0, deadline - time.monotonic())
        done = subprocess.run(
            [str(word) for word in command],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"{command[0]} {command[1]} ended with {done.returncode}: {done.stderr[-2000:]}"
            )
        return done.stdout

    def _spawn(self, *command: str) -> None:
        # pdeathsig: a test session that is killed leaves no daemon behind.
        with open(self.folder / f"{command[0]}.out", "ab") as output:
            self._processes.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *command],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # Ctrl-C reaches us, and we stop them in order
                )
            )

    def _wait_until_it_answers(self, deadline: float) -> None:
        while True:
            for process in self._processes:
                if process.poll() is not None:
                    outputs = "\n".join(path.read_text()[-1000:] for path in self.folder.glob("*.out"))
                    raise RuntimeError(f"{process.args} ended with {process.returncode}: {outputs}")
            connection = http.client.HTTPConnection(self.host, self._port, timeout=2)
            try:
                connection.request("GET", "/")
                if connection.getresponse().status == 200:
                    return
            except (OSError, http.client.HTTPException):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"radosgw did not answer at {self.endpoint} in time") from None
            finally:
                connection.close()
            time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", metavar="DIR", type=Path, required=True, help="a new folder for its files")
    parser.add_argument("--bucket", action="append", default=[], help="a bucket to make; may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="the address that it listens on")
    arguments = parser.parse_args()
    missing = missing_binaries()
    if missing:
        print(f"radosgw: not installed: {', '.join(missing)}", file=sys.stderr)
        return 2
    if arguments.serve.exists() and any(arguments.serve.iterdir()):
        print(f"radosgw: {arguments.serve} is not empty; name a new folder", file=sys.stderr)
        return 2
    # SIGTERM as Ctrl-C, so that `timeout` and service managers stop the daemons too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = Radosgw(folder=arguments.serve.absolute(), host=arguments.host)
    try:
        server.start()
        for bucket in arguments.bucket:
            server.make_bucket(bucket)
        for name, value in server.environment().items():
            print(f"export {name}={value}")
        print("# serving; stop with Ctrl-C", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        print("# stopped", file=sys.stderr)
    finally:
        server.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
