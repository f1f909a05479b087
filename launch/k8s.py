"""Print the manifest of a run on Kubernetes, whole and ready for kubectl. Nothing is sent anywhere.

example: pretrain launch k8s configs/mae/vit_large_patch16.yaml --nodes 4 --gpus-per-node 8 \\
           --image registry.example/vit-pretrain:0.1.0 data.train=s3://bucket/in1k \\
           checkpoint.mirror=s3://bucket/runs/mae | kubectl apply -f -

Flavours: `job`, an Indexed Job, needs nothing but Kubernetes 1.33; `jobset` (recommended for several nodes) makes all
pods anew together when one is lost; `trainjob` is Kubeflow's. --queue gives it to Kueue. It is made of the files in
k8s/, which `kubectl kustomize` takes as well: see k8s/README.md.

A pod's disk is gone with the pod, so the run needs checkpoint.mirror, or a --claim that all pods share. Credentials
come from the service account (workload identity; --role-arn where the cluster has no webhook for it) or from a
--secret, never from this command line.

What a node writes of a checkpoint must fit into --save-seconds at --write-mb-per-second, and what is kept of them into
--runs-gib: refused otherwise, for the pod would be killed or evicted.

exit codes: 0 printed · 2 wrong usage, or a recipe that cannot run in a pod
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from launch import restarts
from launch.manifest import (
    CACHE_GIB,
    COMPONENTS,
    GIB,
    MEMORY_GIB_PER_GPU,
    RENDEZVOUS_SECONDS,
    RUNS,
    RUNS_GIB,
    Pods,
    as_text,
    render,
)
from launch.plan import WRITE_MB_A_SECOND, checkpoint_bytes
from launch.train_command import add_train_arguments, train_options
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.cost import cost_of
from pretrain.errors import UsageError

_SET_HERE = ("data.cache_dir", "data.cache_bytes", "metrics.host", "metrics.port")
_TAKEN = ("/", "/tmp", "/cache", "/etc/pretrain", "/dev/shm", "/home/pretrain")
_CPUS_BESIDE_WORKERS = 2
_LONGEST_NAME = 40  # a JobSet's pod is NAME-node-0-INDEX-xxxxx, and a label of DNS has 63 letters
_SECRET = re.compile(r"SECRET|PASSW|TOKEN|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file; it becomes a ConfigMap")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optim.lr=1e-4")
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="pods, one a node")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G", help="GPUs of each")
    parser.add_argument(
        "--image", required=True, metavar="I", help="of k8s/Dockerfile, with a tag or a digest"
    )
    parser.add_argument(
        "--flavour", choices=list(COMPONENTS), help="default: job for one node, jobset for several"
    )
    parser.add_argument("--queue", metavar="Q", help="a LocalQueue of Kueue's, which starts the run")
    parser.add_argument("--name", metavar="NAME", help="of all that is made (default: the run folder's)")
    parser.add_argument("--namespace", metavar="NS", help="default: kubectl's")
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        metavar="NAME[:PATH]",
        help=f"mount a PersistentVolumeClaim, at {RUNS} unless said; repeat it",
    )
    parser.add_argument(
        "--service-account", metavar="NAME", help="one that is there already (default: one is made)"
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="such as AWS_DEFAULT_REGION=…; repeat it",
    )
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help="its keys become variables; repeat it"
    )
    parser.add_argument(
        "--role-arn",
        metavar="ARN",
        help="of a role that STS gives for the service account's token; not needed with EKS' annotation",
    )
    parser.add_argument(
        "--rdma", metavar="RESOURCE[=COUNT]", help="InfiniBand or RoCE, as the device plugin calls it"
    )
    parser.add_argument("--cpus-per-gpu", type=int, metavar="N", help="default: data.workers and 2 more")
    parser.add_argument(
        "--memory-gib-per-gpu",
        type=int,
        default=MEMORY_GIB_PER_GPU,
        metavar="N",
        help="of the pod (default: 64)",
    )
    parser.add_argument(
        "--cache-gib", type=int, default=CACHE_GIB, metavar="N", help="for fetched chunks, on the node's disk"
    )
    parser.add_argument(
        "--runs-gib",
        type=int,
        default=RUNS_GIB,
        metavar="N",
        help=f"for {RUNS} on the node's disk, without a claim",
    )
    parser.add_argument(
        "--write-mb-per-second",
        type=float,
        default=WRITE_MB_A_SECOND,
        metavar="R",
        help=f"at which a node writes checkpoints, and sends them to a mirror (default: {WRITE_MB_A_SECOND:.0f})",
    )
    parser.add_argument(
        "--rendezvous-seconds",
        type=float,
        default=RENDEZVOUS_SECONDS,
        metavar="S",
        help="in which all pods must run, nodes made and images fetched (default: 1800)",
    )
    parser.add_argument(
        "--no-pod-monitor", action="store_true", help="where Prometheus' operator is not installed"
    )
    parser.add_argument("--dry-run", action="store_true", help="printing is all that this command does")
    restarts.add_arguments(parser)
    add_train_arguments(parser)


def run(args: argparse.Namespace) -> int:
    restarts.check_arguments(args)
    config = load_config(args.config, args.overrides)
    pods = pods_of(args, config)
    documents = render(
        pods,
        recipe=Path(args.config).read_text(encoding="utf-8"),
        flavour=args.flavour or ("job" if pods.nodes == 1 else "jobset"),
        namespace=args.namespace,
        queue=args.queue,
        rdma=None if args.rdma is None else _rdma(args.rdma),
        role_arn=None if args.role_arn is None else _role(args.role_arn),
        service_account=args.service_account,
        pod_monitor=not args.no_pod_monitor,
    )
    print(as_text(documents), end="")
    return 0


def pods_of(args: argparse.Namespace, config: RunConfig) -> Pods:
    """Raises UsageError for what would fail in a pod."""
    for option in ("nodes", "gpus_per_node", "cpus_per_gpu", "memory_gib_per_gpu", "cache_gib", "runs_gib"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: give 1 or more")
    if args.memory_gib_per_gpu < 4:
        raise UsageError(f"--memory-gib-per-gpu {args.memory_gib_per_gpu}: 1 of it is shm; give 4 or more")
    for option in ("rendezvous_seconds", "write_mb_per_second"):
        if not getattr(args, option) > 0:
            raise UsageError(f"--{option.replace('_', '-')} {getattr(args, option)}: give more than 0")
    name = _name(args.name, config)
    for option in ("namespace", "queue", "service_account"):
        if (value := getattr(args, option)) is not None:
            _check_name(value, f"--{option.replace('_', '-')}", longest=63)
    _check_image(args.image)
    claims = _claims(args.claim)
    run_dir = config.run_dir if _below(config.run_dir, claims) else f"{RUNS}/{name}"
    if not _below(run_dir, claims) and not config.checkpoint.mirror:
        raise UsageError(
            f"run_dir would be {run_dir} on the pod's own disk, and gone with the pod: set "
            "checkpoint.mirror=s3://…, or give a --claim that all pods share"
        )
    _check_checkpoints(args, config, is_shared=_below(run_dir, claims))
    _check_urls(config, claims)
    for override in args.overrides:
        if override.partition("=")[0] in _SET_HERE:
            raise UsageError(
                f"{override}: the manifest sets this key; leave it out (--cache-gib sizes the cache)"
            )
    return Pods(
        name=name,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        image=args.image,
        cpus_per_gpu=args.cpus_per_gpu or config.data.workers + _CPUS_BESIDE_WORKERS,
        memory_gib_per_gpu=args.memory_gib_per_gpu,
        cache_gib=args.cache_gib,
        runs_gib=args.runs_gib,
        save_seconds=args.save_seconds,
        rendezvous_seconds=args.rendezvous_seconds,
        max_restarts=args.max_restarts,
        options=train_options(args),
        overrides=[text for text in args.overrides if not text.startswith("run_dir=")],
        run_dir=run_dir,
        claims=claims,
        variables=_variables(args.env),
        secrets=[_check_name(secret, "--secret", longest=253) for secret in args.secret],
    )


def _name(given: str | None, config: RunConfig) -> str:
    if given is not None:
        return _check_name(given, "--name", longest=_LONGEST_NAME)
    made = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(config.run_dir).name.lower())[:_LONGEST_NAME].strip("-")
    if not re.match("[a-z]", made):
        raise UsageError(f"run_dir={config.run_dir} makes no name for Kubernetes; give --name")
    return made


def _check_name(name: str, option: str, *, longest: int) -> str:
    if len(name) > longest or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise UsageError(
            f"{option} {name}: give small letters, digits and dashes, a letter first, {longest} at most"
        )
    return name


def _check_image(image: str) -> None:
    tag = image.rpartition("/")[2].partition(":")[2]
    if not image or any(letter.isspace() for letter in image):
        raise UsageError(f"--image {image!r} is no image")
    if "@sha256:" not in image and tag in ("", "latest"):
        raise UsageError(
            f"--image {image}: nodes that fetch it at different times may get different ones; name a tag that "
            "stays, or a digest"
        )


def _claims(given: Sequence[str]) -> dict[str, str]:
    claims: dict[str, str] = {}
    for text in given:
        name, _, path = text.partition(":")
        path = path.rstrip("/") or (RUNS if not path else "/")
        _check_name(name, "--claim", longest=253)
        if not path.startswith("/") or path in claims or path in _TAKEN:
            raise UsageError(f"--claim {text}: {path} is no path of its own; give NAME:/PATH")
        claims[path] = name
    return claims


def _below(path: str, claims: Mapping[str, str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in claims)


def _check_checkpoints(args: argparse.Namespace, config: RunConfig, *, is_shared: bool) -> None:
    """A node writes its ranks' part of each; on its own disk it holds those that are kept, and one that is written."""
    part = checkpoint_bytes(config, cost_of(config, config.objective.num_classes)) / args.nodes
    rate = args.write_mb_per_second * 1e6
    times = 2 if config.checkpoint.mirror else 1  # the mirror's copy is read from the disk's
    seconds = times * part / rate
    if 0 < args.save_seconds < seconds:  # 0: who asks for it wants no save
        sent = " and sends it to the mirror" if config.checkpoint.mirror else ""
        raise UsageError(
            f"--save-seconds {args.save_seconds:g}: a node writes {part / 1e9:,.1f} GB of a checkpoint{sent}, in "
            f"{seconds:,.0f} s at {args.write_mb_per_second:g} MB/s, and would be killed meanwhile; give more, or the "
            "rate that yours reach with --write-mb-per-second"
        )
    kept = config.checkpoint.keep_last + (config.checkpoint.keep_best is not None)
    held = (kept + 1) * part
    if not is_shared and held > args.runs_gib * GIB:
        raise UsageError(
            f"--runs-gib {args.runs_gib}: {kept} checkpoints that are kept, and one that is written, are "
            f"{held / GIB:,.1f} GiB on a node, and the pod would be evicted; give more, or lower checkpoint.keep_last"
        )


def _check_urls(config: RunConfig, claims: Mapping[str, str]) -> None:
    urls = [("data.train", source.url) for source in config.data.sources]
    probes = config.eval.probes
    further = {
        "data.val": config.data.val,
        "init_from": config.init_from,
        "eval.probes.train": probes.train if probes else None,
        "eval.probes.val": probes.val if probes else None,
    }
    for key, url in [*urls, *further.items()]:
        if url and not url.startswith("s3://") and not _below(url, claims):
            raise UsageError(
                f"{key}={url} is not there in a pod; give s3://…, or a --claim NAME:/PATH that has it"
            )


def _variables(given: Sequence[str]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UsageError(f"--env {text}: give NAME=VALUE")
        if _SECRET.search(name):
            raise UsageError(
                f"--env {name}=…: it would stand in the manifest for all to read; bind the service account to a "
                "role, or put it into a Secret and give --secret"
            )
        variables[name] = value
    return variables


def _role(given: str) -> str:
    # AWS' accounts are numbers; radosgw's have letters, or none, as MinIO's.
    if not re.fullmatch(r"arn:[\w-]+:iam::\w*:role/[\w+=,.@/-]+", given):
        raise UsageError(
            f"--role-arn {given}: give a role's, such as arn:aws:iam::123456789012:role/pretrain"
        )
    return given


def _rdma(given: str) -> tuple[str, str]:
    resource, _, count = given.partition("=")
    count = count or "1"
    if not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", resource) or not count.isdigit() or int(count) < 1:
        raise UsageError(
            f"--rdma {given}: give what the device plugin calls it, such as rdma/ib or rdma/ib=8"
        )
    return resource, count
