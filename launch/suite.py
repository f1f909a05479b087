"""What `pretrain transfer` is to run: a suite file, read and spread out into parts. Used by transfer.py.

A part is one `pretrain train`: a dataset, a start and a seed. It has a name that follows from all that decides its
result, so that a part that is done is known again, and one that would come out differently is another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from pretrain.checkpoint.compatibility import flatten
from pretrain.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME
from pretrain.config.load import overridden, read_recipe
from pretrain.config.schema import RunConfig, Section
from pretrain.data.index import open_index
from pretrain.derived import is_image_source, s3_settings
from pretrain.errors import ConfigError, UsageError
from pretrain.intervals import MOST_VALUES
from pretrain.storage import is_remote

StartName = Literal["pretrained", "scratch", "linear-probe"]
Overrides = dict[str, Any]  # recipe keys, as "train.steps": 100

# What each start means in a recipe, besides init_from; a suite's own overrides come after.
STARTS: dict[StartName, Overrides] = {
    "pretrained": {},
    "scratch": {"init_head": False},  # which a recipe may ask of its init_from
    # longer than any run: the backbone stays, bit for bit, and gives the same features of an image each time
    "linear-probe": {"optim.freeze_backbone_steps": 10**9, "model.drop_path_rate": 0.0},
}
OF_ALL: Overrides = {"metrics.port": 0}  # parts at a time would all want the recipe's
FROM_BACKBONE: tuple[StartName, ...] = ("pretrained", "linear-probe")

# Set by each part itself, or by where its start and data are: an override of them would be lost.
OWN_KEYS = ("run_dir", "seed", "init_from", "data.train", "data.val")
# What decides no result: how a part reads, saves and reports.
_WITHOUT_MEANING = (
    *(
        "run_dir",
        "init_from",
        "data.train",
        "data.val",
        "checkpoint",
        "metrics",
        "watchdog",
        "storage",
        "export",
    ),
    *(
        "data.workers",
        "data.worker_timeout_seconds",
        "data.cache_dir",
        "data.cache_bytes",
        "data.prefetch_bytes",
    ),
    "data.decoder",
)


class DatasetEntry(Section):
    """Shards to learn from and to be right on, and what else a recipe needs for them."""

    train: str
    val: str
    overrides: Overrides = Field(default_factory=dict)


class Suite(Section):
    """A suite file. recipe and local folders in it are as seen from where the command is typed."""

    recipe: str
    init_from: str | None = None  # of the starts that need one: a run, a checkpoint, an export
    datasets: Annotated[dict[str, DatasetEntry], Field(min_length=1)]
    starts: Annotated[dict[StartName, Overrides | None], Field(min_length=1)] = dict.fromkeys(STARTS)
    seeds: Annotated[tuple[int, ...], Field(strict=False, min_length=1, max_length=MOST_VALUES)] = (0, 1, 2)
    metric: str = "top1"  # of the last validation; a share of 1, or a loss
    overrides: Overrides = Field(default_factory=dict)  # of every part

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"{list(seeds)}: give each seed once")
        return seeds

    @field_validator("datasets")
    @classmethod
    def _names_of_folders(cls, datasets: dict[str, DatasetEntry]) -> dict[str, DatasetEntry]:
        for name in datasets:
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"{name!r}: a dataset's name becomes a folder's: letters, digits, - and _")
        return datasets


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run of `pretrain train`. overrides: as on a command line, all but run_dir. key: what its result follows
    from, as a digest."""

    dataset: str
    start: str
    seed: int
    overrides: tuple[str, ...]
    key: str

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.start}-{self.seed}-{self.key}"

    def __str__(self) -> str:
        return f"{self.dataset}, {self.start}, seed {self.seed}"


def read_suite(path: Path) -> Suite:
    """Raises ConfigError for what is no suite."""
    values = read_recipe(path)
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(map(str, issue['loc']))}: {issue['msg'].removeprefix('Value error, ')}"
            for issue in error.errors()
        )
        raise ConfigError(f"{path}: {said}; it knows the keys {', '.join(Suite.model_fields)}") from None
    needs = [start for start in suite.starts if start in FROM_BACKBONE]
    if needs and suite.init_from is None:
        raise ConfigError(f"{path}: the start{'s' * (len(needs) > 1)} {', '.join(needs)} need init_from")
    given = {"overrides": suite.overrides}
    given |= {f"datasets.{name}.overrides": entry.overrides for name, entry in suite.datasets.items()}
    given |= {f"starts.{name}": overrides or {} for name, overrides in suite.starts.items()}
    for where, overrides in given.items():
        for key in overrides:
            if key in OWN_KEYS:
                raise ConfigError(f"{path}: {where}: {key} is each part's own; leave it out")
    return suite


def parts_of(suite: Suite) -> list[Part]:
    """All parts, dataset by dataset, start by start, and seed by seed.

    Each one's recipe is checked. Raises ConfigError for a wrong one, and UsageError or what reading raises for a
    dataset without an index, or a backbone that is not there.
    """
    recipe = read_recipe(Path(suite.recipe))
    init_from, backbone = None, None
    if any(start in FROM_BACKBONE for start in suite.starts):
        assert suite.init_from is not None, "a suite without it was refused"
        init_from, backbone = identify_backbone(suite.init_from)
    parts = []
    for dataset, entry in suite.datasets.items():
        identities: dict[str, str] = {}
        for start, more in suite.starts.items():
            from_backbone = start in FROM_BACKBONE
            chosen = {**OF_ALL, **suite.overrides, **entry.overrides, **STARTS[start], **(more or {})}
            for seed in suite.seeds:
                own = {
                    "data.train": entry.train,
                    "data.val": entry.val,
                    "init_from": init_from if from_backbone else None,
                    "seed": seed,
                }
                words = tuple(f"{key}={json.dumps(value)}" for key, value in {**chosen, **own}.items())
                # the folder's name holds a digest of the rest: any will do to check it
                config = overridden(
                    recipe, [*words, "run_dir=PART"], source=f"{suite.recipe}, for {dataset}, {start}"
                )
                if config.objective.name != "classification":
                    raise ConfigError(
                        f"{suite.recipe}: objective.name={config.objective.name} has no classes to be right on; "
                        "transfer is measured by classification"
                    )
                if config.checkpoint.mirror is not None:
                    raise ConfigError(
                        f"{suite.recipe}: checkpoint.mirror={config.checkpoint.mirror} would be that of all parts, and "
                        "a mirror belongs to one run; add checkpoint.mirror: null to the suite's overrides"
                    )
                if not identities:
                    identities = {
                        which: _identity(url, config)
                        for which, url in (("train", entry.train), ("val", entry.val))
                    }
                key = key_of(config, data=identities, backbone=backbone if from_backbone else None)
                parts.append(Part(dataset=dataset, start=start, seed=seed, overrides=words, key=key))
    return parts


def key_of(config: RunConfig, *, data: Mapping[str, str], backbone: str | None) -> str:
    """A digest of what decides a part's result: its recipe but for what only decides how it is run, the data's
    identities wherever they lie, and the weights it starts from."""
    flat = flatten(config.model_dump(mode="json"))
    meant = {
        key: value
        for key, value in flat.items()
        if not any(key == without or key.startswith(f"{without}.") for without in _WITHOUT_MEANING)
    }
    text = json.dumps([meant, dict(data), backbone], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _identity(url: str, config: RunConfig) -> str:
    if is_image_source(url):
        raise UsageError(
            f"{url}: holds images, not shards; pack them first: pretrain data pack {url} SHARDS --val-fraction 0.2"
        )
    return open_index(url, s3=s3_settings(config)).identity


def identify_backbone(source: str) -> tuple[str, str]:
    """What parts start from, as they are told it, and a digest of its weights.

    Of a run the newest checkpoint is taken for all parts, though the run may go on. What lies in a bucket goes by its
    URL. Raises UsageError when there is nothing.
    """
    if is_remote(source):
        return source, source
    path = Path(source)
    if (path / CHECKPOINTS).is_dir() or (path / MANIFEST_NAME).is_file():
        from pretrain.checkpoint.load import find_newest  # brings torch

        folder = find_newest(path)
        return str(folder), _digest_of([folder / MANIFEST_NAME])  # it holds digests of the rest
    files = (
        [path] if path.is_file() else sorted(path.glob("*.safetensors")) + sorted(path.glob("config.json"))
    )
    if not files:
        raise UsageError(
            f"init_from: {source}: there is no run, checkpoint, export or .safetensors file; "
            "`pretrain export` makes an export"
        )
    return source, _digest_of(files)


def _digest_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
