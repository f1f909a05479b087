"""Pods on this machine, as a node's kubelet would start them from a manifest; needs root, and no container engine.

A pod has a network namespace with an address, its own host name, PIDs that begin with 1, a read-only root file system
(an overlay over this machine's), the manifest's volumes, and runs the container's command as its user, without
capabilities and with no environment but the manifest's. /etc/hosts stands in for the cluster's DNS. What is not there:
the API server, the Job's controller (the test starts pods anew as it would), limits, GPUs.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from launching import ROOT
from services.ssh_hosts import Hosts

from launch.processes import children_of

BINARIES = ("ip", "unshare", "setpriv", "mount", "chroot")
NAMESPACE = "research.svc.cluster.local"


def unavailable() -> str | None:
    """Why pods cannot be had here, None when they can."""
    if missing := [name for name in BINARIES if shutil.which(name) is None]:
        return f"pods need {', '.join(missing)}"
    if os.geteuid() != 0:
        return "pods need root"
    if Path("/tmp") in ROOT.parents:
        return (
            f"a pod has a /tmp of its own, and this checkout, {ROOT}, would not be in it: take another place"
        )
    overlay = "mount -t overlay overlay -o lowerdir=/,upperdir=u,workdir=w r"
    mounts = f"mount -t tmpfs tmpfs /mnt && cd /mnt && mkdir u w r && {overlay}"
    probe = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", mounts]
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"pods cannot be made here: {done.stderr.strip()}" if done.returncode else None


class PodNetwork(Hosts):
    """Hosts without sshd: `folder` is where the pods' volumes and logs are."""

    def __enter__(self) -> PodNetwork:
        try:
            self._make_switch()
            for number, name in enumerate(self.names):
                self._make_host(number, name)
        except BaseException:
            self.__exit__()
            raise
        return self


class Pod:
    """Pod `index` of a Job whose pods are called `job`-INDEX.`subdomain`. `claims`: folders by claim."""

    def __init__(
        self,
        network: PodNetwork,
        index: int,
        spec: dict[str, Any],
        *,
        job: str,
        subdomain: str,
        config_map: dict[str, str],
        claims: dict[str, Path],
    ) -> None:
        self.index, self.address = index, network.address(f"h{index}")
        number = len(list(network.folder.glob(f"pod-{index}-*.log")))
        self.log = network.folder / f"pod-{index}-{number}.log"
        place = network.folder / f"pod-{index}-{number}"
        place.mkdir()
        names = {f"h{n}": f"{job}-{n}" for n in range(len(network.names))}
        hosts = "".join(
            f"{network.address(host)} {name}.{subdomain}.{NAMESPACE} {name}.{subdomain} {name}\n"
            for host, name in names.items()
        )
        (place / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        (container,) = spec["containers"]
        script = _root(place) + _volumes(spec, container, place, config_map, claims)
        user = spec["securityContext"]
        words = ["setpriv", f"--reuid={user['runAsUser']}", f"--regid={user['runAsGroup']}", "--clear-groups"]
        words += ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "env", "-i"]
        words += [f"{name}={value}" for name, value in self._variables(container, names[f"h{index}"]).items()]
        command = [self._expand(text, container) for text in [*container["command"], *container["args"]]]
        script += f"hostname {names[f'h{index}']}\nmount -o remount,ro root\n"
        script += f"exec chroot root {shlex.join([*words, *command])}\n"
        inside = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", network.namespace(f"h{index}"), *inside, "sh", "-euc", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def signal(self, signum: signal.Signals) -> None:
        """To the container's first process, as the kubelet does. With SIGKILL all of its processes are gone."""
        [pid] = children_of(self.process.pid)
        os.kill(pid, signum)

    def end(self) -> None:
        # Not unshare, whose death the container would not hear of, as it became another user.
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def _variables(self, container: dict[str, Any], hostname: str) -> dict[str, str]:
        image = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOSTNAME": hostname}
        given = {each["name"]: each.get("value") or self._field(each) for each in container["env"]}
        # One thread: there may be two cores for all pods.
        return {**image, "OMP_NUM_THREADS": "1", "JOB_COMPLETION_INDEX": str(self.index), **given}

    def _field(self, variable: dict[str, Any]) -> str:
        assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
        return self.address

    def _expand(self, text: str, container: dict[str, Any]) -> str:
        known = {each["name"]: each.get("value") or self._field(each) for each in container["env"]}
        return re.sub(r"\$\((\w+)\)", lambda found: known.get(found[1], found[0]), text)


def _root(place: Path) -> str:
    """Makes ./root of this machine's, with `pretrain` in it, where the image has it."""
    command = f'#!/bin/sh\nexport PYTHONPATH={ROOT}\nexec {sys.executable} -m pretrain.cli "$@"\n'
    (place / "pretrain").write_text(command)
    readable = [parent for parent in Path(sys.executable).resolve().parents if parent != Path("/")]
    return "\n".join(
        [
            f"cd {place}; mkdir layers; mount -t tmpfs tmpfs layers; cp pretrain hosts layers; cd layers",
            "mkdir upper work root",
            "mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root",
            # An image's Python may be run by anybody.
            *(f"chmod o+x root{folder}" for folder in readable),
            "cp pretrain root/usr/local/bin/pretrain; chmod 755 root/usr/local/bin/pretrain; cp hosts root/etc/hosts",
            "mount -t proc proc root/proc; mount --rbind /dev root/dev",
            "",
        ]
    )


def _volumes(
    spec: dict[str, Any],
    container: dict[str, Any],
    place: Path,
    config_map: dict[str, str],
    claims: dict[str, Path],
) -> str:
    named = {volume["name"]: volume for volume in spec["volumes"]}
    script = ""
    for mount in container["volumeMounts"]:
        volume = named[mount["name"]]
        if "persistentVolumeClaim" in volume:
            folder = claims[volume["persistentVolumeClaim"]["claimName"]]
        else:
            folder = place / "volumes" / mount["name"]
            folder.mkdir(parents=True)
        if "configMap" in volume:
            for name, text in config_map.items():
                (folder / name).write_text(text)
        else:
            folder.chmod(0o777)  # as an emptyDir is
        target = f"root{mount['mountPath']}"
        script += f"mkdir -p {target}; mount --bind {folder} {target}\n"
        if mount.get("readOnly"):
            script += f"mount -o remount,bind,ro {target}\n"
    return script
