"""Read a backbone: from a run, a checkpoint, an export, or a plain safetensors file.

`init_from:`, `pretrain evaluate` and `pretrain export` start here. Nothing is unpickled unless that is asked for, and
every tensor that was found ends up in the backbone, in the class head, or named with a reason.
loading.py puts what was read into a model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint.load import find_newest, load_weights
from pretrain.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST_NAME, Manifest, read_manifest
from pretrain.checkpoint.mirror import Mirror, MirroredSave
from pretrain.checkpoint.mirrored import adopt_save, answered_by_store, take_back
from pretrain.errors import CheckpointError, StorageError, UsageError
from pretrain.formats.bare import notes_of_guesses, spec_of_tensors, spec_of_timms_own
from pretrain.formats.files import read_json, read_tensors
from pretrain.formats.hugging_face import (
    from_hugging_face,
    is_hugging_face,
    notes_of,
    read_hugging_face_config,
)
from pretrain.formats.hugging_face_pvt import UNSCALED
from pretrain.formats.naming import Parts, sort_out, why_left_out
from pretrain.formats.pickles import read_pickle
from pretrain.formats.plain import is_plain, read_plain_config
from pretrain.formats.timm import from_timm, is_timm, is_written_out, read_timm_config
from pretrain.metrics.journal import JOURNAL_NAME, read_events
from pretrain.models.pos_embed import sincos_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.storage import S3Settings, Storage, is_remote, join_url, open_storage, split_url

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".npz")
TORCH_PICKLES = (".pth", ".pt", ".ckpt")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
RECORD = "export.json"  # what our own exports say about their origin
MIRROR_RECORD = "run.json"  # what makes a folder or prefix the mirror of a run
RECIPE = ("seed", "init_from", "init_head", "model", "objective", "data", "train", "optim", "deepspeed")
PLACES = ("train", "val", "cache_dir", "cache_bytes", "workers", "prefetch_bytes")
PROBE_FACTS = (
    "probe",
    "top1",
    "step",
    "train_identity",
    "train_samples",
    "val_identity",
    "val_samples",
    "num_classes",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a backbone came from. kind is "run", "mirror" (of a run), "timm", "hf", "plain", "safetensors" or "pickle";
    recipe, probes and license are for the card of an export; step, samples, attempt and
    dataset_identity are None where they are not known; config is a run's resolved recipe or {}. weights: "ema" or
    "raw" of a run, None where it is not known."""

    kind: str
    url: str
    step: int | None = None
    samples: int | None = None
    attempt: int | None = None
    dataset_identity: str | None = None
    config: Mapping[str, Any]
    weights: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    probes: tuple[Mapping[str, Any], ...] = ()
    license: str | None = None

    @property
    def s3(self) -> S3Settings:
        """How the run reached its bucket."""
        storage = self.config.get("storage", {})
        return S3Settings(
            addressing_style=storage.get("addressing_style"), checksums=storage.get("checksums")
        )

    def __str__(self) -> str:
        step = "" if self.step is None else f", step {self.step}"
        return f"{self.url} ({self.kind}{step}{', average of the weights' if self.weights == EMA else ''})"


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """A backbone as it was read: float32 tensors on the CPU in timm's names, without a prefix.

    head is {} or {"weight": (K, D), "bias": (K,)}; left_out names all other tensors, with reasons.
    assumed names fields of spec that the source did not state (a bare safetensors file has no
    num_heads, mean or std). notes: what of the network is not quite the source's.
    """

    spec: BackboneSpec
    backbone: dict[str, Tensor]
    head: dict[str, Tensor]
    left_out: dict[str, str]
    source: Source
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_backbone(
    url_or_path: str | Path, *, weights: str | None = None, trust_pickle: bool = False
) -> Incoming:
    """Read a run's folder or its mirror, a checkpoint, an export, a folder of timm's or transformers', or a
    .safetensors file; with trust_pickle also a local .pth (see pickles.py).

    All but pickles may be s3:// URLs; of a run's mirror what is needed is brought to a temporary folder. weights: "ema"
    or "raw"; of a checkpoint that holds an average of the weights, the average is taken unless "raw" is asked for.
    Raises UsageError when there is nothing of the kind there, for a pickle that is not trusted, and where an average is
    asked for that is not there; CheckpointError when what is there is damaged, incomplete or describes another model.
    """
    url = str(url_or_path).rstrip("/")
    if url.lower().endswith(PICKLES):
        if not trust_pickle or not url.lower().endswith(TORCH_PICKLES) or is_remote(url):
            raise UsageError(
                f"{url}: is a pickle, which can run any code when it is opened; load it where you trust it "
                "and save its tensors with safetensors.torch.save_file, or copy it here and train with --trust-pickle "
                f"({', '.join(TORCH_PICKLES)})"
            )
        return _read_bare_file(read_pickle(Path(url.removeprefix("file://"))), url, kind="pickle")
    if not is_remote(url):
        path = Path(url.removeprefix("file://"))
        if not path.exists():
            raise UsageError(
                f"{url}: there is no such file or folder; give a run, a checkpoint or an export. Where a run has a "
                "checkpoint.mirror, `pretrain checkpoints MIRROR --bring-back RUN` makes its folder anew"
            )
        if (path / MIRROR_RECORD).is_file():
            return _read_mirror(str(path), weights)
        if path.is_dir() and ((path / MANIFEST_NAME).is_file() or (path / CHECKPOINTS).is_dir()):
            return _read_run(path, weights)
        if weights == EMA:
            raise UsageError(
                f"{url}: is no run, only runs hold an average of the weights; leave --weights out"
            )
        if path.is_file() and not (path.name == WEIGHTS and (path.parent / CONFIG).is_file()):
            return _read_bare_file(read_tensors(path, where=url), url)
        folder = open_storage(str(path.parent if path.is_file() else path))
    elif is_save(url) or (not url.endswith(".safetensors") and _has(open_storage(url), MIRROR_RECORD)):
        return _read_mirror(url, weights)
    elif weights == EMA:
        raise UsageError(f"{url}: only runs hold an average of the weights; leave --weights out")
    elif url.endswith(".safetensors"):
        parent, name = split_url(url)
        folder = open_storage(parent)
        if name != WEIGHTS or not folder.exists(CONFIG):
            return _read_bare_file(read_tensors(_fetch(folder, name), where=url), url)
    else:
        folder = open_storage(url)
    return _read_export(folder)


def is_save(url: str) -> bool:
    """Is that a checkpoint in a run's mirror, by its name?"""
    parent, name = split_url(url)
    return split_url(parent)[1] == CHECKPOINTS and MirroredSave.parse(name) is not None


def _read_mirror(url: str, weights: str | None) -> Incoming:
    """A run of which only the mirror is here, its newest checkpoint or the one that is named.

    A temporary folder stands in for the run's; it takes the checkpoint's files, moments too, while they are read.
    """
    root, save = url, None
    if is_save(url):
        parent, name = split_url(url)
        root, save = split_url(parent)[0], MirroredSave.parse(name)
    mirror = Mirror(root, s3=S3Settings())
    with tempfile.TemporaryDirectory(prefix="pretrain-mirror-") as place:
        run_dir = Path(place, "run")
        answered_by_store(lambda: take_back(run_dir, mirror, push=False))
        if save is None:
            folder = find_newest(run_dir)
        else:
            if not answered_by_store(lambda: mirror.committed_manifest(save)):
                raise UsageError(f"{url}: there is no such checkpoint, or it was not committed; see {root}")
            folder = answered_by_store(lambda: adopt_save(run_dir, mirror, save))
        incoming = _read_run(folder, weights)
        manifest = read_manifest(folder)
        name = MirroredSave.of(manifest.step, manifest.save_id).folder
    source = replace(incoming.source, kind="mirror", url=join_url(root, name))
    return replace(incoming, source=source)


def _has(folder: Storage, name: str) -> bool:
    """UsageError where the store refuses, or cannot be had at the start."""
    try:
        return folder.exists(name)
    except StorageError as error:
        raise UsageError(f"{folder.url}: {error}") from error


def _fetch(folder: Storage, name: str) -> Path | bytes:
    """The file itself where it is local, else its bytes; UsageError when it cannot be had at the start."""
    try:
        return folder.local_path(name) or folder.read(name)
    except StorageError as error:
        raise UsageError(f"{join_url(folder.url, name)}: {error}") from error


def _read_run(path: Path, weights: str | None) -> Incoming:
    step_folder = find_newest(path)
    manifest = read_manifest(step_folder)
    where = str(step_folder)
    averages = any(piece.kind == EMA for slices in manifest.files.values() for piece in slices)
    if weights == EMA and not averages:
        raise UsageError(
            f"{where}: holds no average of the weights (optim.ema_decay was not set); leave --weights out"
        )
    kind = EMA if averages and weights != "raw" else "weight"

    def wanted(name: str) -> bool:
        return name.startswith(("backbone.", "head."))

    left_out = {
        name: why_left_out(name) or "the objective's own" for name in manifest.parameters if not wanted(name)
    }
    found = load_weights(step_folder, kind=kind, wanted=wanted)
    tensors = {name.removeprefix("backbone."): value for name, value in found.items()}
    del found
    head = tensors.get("head.weight")
    spec = _spec_of_run(manifest, num_classes=None if head is None else head.shape[0], where=where)
    if spec.position_embedding == "sincos":  # fixed, so a checkpoint of trained parameters lacks it
        fixed = sincos_pos_embed(spec.grid, spec.embed_dim, num_prefix_tokens=spec.num_position_prefix)
        tensors.setdefault("pos_embed", fixed)
    parts = sort_out(tensors, spec, where=where)
    source = Source(
        kind="run",
        url=where,
        step=manifest.step,
        samples=manifest.samples,
        attempt=manifest.attempt,
        dataset_identity=manifest.dataset.get("identity"),
        config=manifest.config,
        weights=EMA if kind == EMA else "raw",
        recipe=recipe_of(manifest.config),
        probes=_probes_of(step_folder, manifest.step),
        license=manifest.config.get("export", {}).get("license"),
    )
    return _incoming(spec, parts, source, left_out)


def recipe_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a resolved recipe decides what is learned, without where things lie: it is shown to strangers."""
    kept: dict[str, Any] = {key: config[key] for key in RECIPE if key in config}
    if kept.get("init_from"):
        kept["init_from"] = split_url(str(kept["init_from"]))[1]
    if isinstance(kept.get("data"), Mapping):
        kept["data"] = {key: value for key, value in kept["data"].items() if key not in PLACES}
    return kept


def _probes_of(step_folder: Path, step: int) -> tuple[dict[str, Any], ...]:
    """The newest result of each probe up to `step`, from the journal of the run that the checkpoint lies in."""
    if step_folder.absolute().parent.name != CHECKPOINTS:
        return ()
    journal = step_folder.absolute().parents[1] / JOURNAL_NAME
    newest: dict[str, dict[str, Any]] = {}
    for record in read_events(journal, ("probe",)):
        if record.get("init") == "random" or not isinstance(record.get("step"), int) or record["step"] > step:
            continue
        newest[str(record["probe"])] = {name: record.get(name) for name in PROBE_FACTS}
    return tuple(newest.values())


def _spec_of_run(manifest: Manifest, *, num_classes: int | None, where: str) -> BackboneSpec:
    """The backbone that a checkpoint's resolved recipe builds; num_classes is its head's, if any."""
    try:
        names = manifest.dataset.get("class_names")
        return BackboneSpec.of_recipe(
            manifest.config["model"],
            manifest.config["data"],
            num_classes=num_classes,
            # a head wider than the dataset's classes (objective.num_classes) has no names to give
            class_names=names if num_classes and names and len(names) == num_classes else None,
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: the manifest's config lacks {error}; it is no run of this project's"
        ) from error


def _read_export(folder: Storage) -> Incoming:
    where = folder.url
    has_config, has_weights = _has(folder, CONFIG), _has(folder, WEIGHTS)
    if not (has_config and has_weights):
        lacks = " and ".join(name for name, has in ((CONFIG, has_config), (WEIGHTS, has_weights)) if not has)
        raise UsageError(
            f"{where}: holds neither a run's checkpoints nor an export (no {lacks}); give a run, a "
            "checkpoint, a folder that `pretrain export` wrote, or a .safetensors file"
        )
    config = _read_json(folder, CONFIG)
    weights = _fetch(folder, WEIGHTS)
    tensors = read_tensors(weights, where=join_url(where, WEIGHTS))
    try:
        kind, spec, tensors, assumed = _understood(folder, config, tensors)
    except CheckpointError as error:
        if where in str(error):
            raise
        raise CheckpointError(f"{where}: {error}") from None
    parts = sort_out(tensors, spec, where=where)
    card = _read_json(folder, RECORD) if folder.exists(RECORD) else {}
    record = card.get("source", {})
    source = Source(
        kind=kind,
        url=where,
        step=record.get("step"),
        samples=record.get("samples"),
        dataset_identity=record.get("dataset_identity"),
        config={},
        weights=record.get("weights"),
        recipe=card.get("recipe") or {},
        probes=tuple(card.get("probes") or ()),
        license=card.get("license"),
    )
    incoming = _incoming(spec, parts, source, {}, assumed=assumed)
    return replace(incoming, notes=notes_of(config)) if kind == "hf" else incoming


def _understood(
    folder: Storage, config: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[str, BackboneSpec, dict[str, Tensor], tuple[str, ...]]:
    """Whose folder it is, the backbone, its tensors under our names, and what of it is a guess."""
    where = folder.url
    assumed: tuple[str, ...] = ()
    if is_hugging_face(config):
        kind, preprocessor = "hf", "preprocessor_config.json"
        normalise = _read_json(folder, preprocessor) if folder.exists(preprocessor) else None
        spec = read_hugging_face_config(config, normalise, where=where)
        unscaled = None
        if spec.name == "pvt" and folder.exists(UNSCALED):
            unscaled = read_tensors(_fetch(folder, UNSCALED), where=join_url(where, UNSCALED))
        tensors = from_hugging_face(tensors, spec, unscaled=unscaled)
    elif is_plain(config):
        kind, spec = "plain", read_plain_config(config, where=where)
    elif is_timm(config):
        kind, tensors = "timm", from_timm(tensors)
        if is_written_out(config):
            spec = read_timm_config(config, where=where)
        else:
            spec, assumed = spec_of_timms_own(config, tensors, where=where)
    else:
        raise CheckpointError(
            f"{where}: {CONFIG} is neither timm's nor transformers' nor a plain export's; it names no architecture"
        )
    return kind, spec, tensors, assumed


def _read_json(folder: Storage, name: str) -> dict[str, Any]:
    return read_json(folder.read(name), where=join_url(folder.url, name))


def _read_bare_file(tensors: Mapping[str, Tensor], url: str, *, kind: str = "safetensors") -> Incoming:
    """A file of tensors alone: sizes are read off them, what they do not say is assumed."""
    tensors = {name.removeprefix("backbone."): value for name, value in tensors.items()}
    spec, assumed = spec_of_tensors(tensors, where=url)
    if _hugging_face_names(tensors):
        tensors = from_hugging_face(tensors, spec)
    parts = sort_out(tensors, spec, where=url)
    source = Source(kind=kind, url=url, config={})
    return _incoming(spec, parts, source, {}, assumed=assumed)


def _hugging_face_names(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.removeprefix("vit.") == "embeddings.cls_token" for name in tensors)


def _incoming(
    spec: BackboneSpec,
    parts: Parts,
    source: Source,
    left_out: Mapping[str, str],
    assumed: tuple[str, ...] = (),
) -> Incoming:
    if parts.head and spec.num_classes is None:
        spec = replace(spec, num_classes=parts.head["weight"].shape[0])
    elif not parts.head:
        spec = replace(spec, num_classes=None, class_names=None)
    return Incoming(
        spec=spec,
        backbone={name: value.float() for name, value in parts.backbone.items()},
        head={name: value.float() for name, value in parts.head.items()},
        left_out={**left_out, **parts.left_out},
        source=source,
        assumed=assumed,
        notes=notes_of_guesses(assumed),
    )
