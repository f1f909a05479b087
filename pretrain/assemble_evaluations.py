"""From a recipe to what a run measures beside its training. Called by train.py, above assemble_data.py's parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.analysis.choice import spread_samples
from pretrain.analysis.picture import require_matplotlib
from pretrain.assemble_data import Data, build_reader, num_label_bits
from pretrain.config.schema import ProbesConfig, RunConfig
from pretrain.data.augment import DeviceTransform, EvalTransform
from pretrain.data.decode import resolve_decoder
from pretrain.data.index import DatasetIndex, open_index, open_samples
from pretrain.data.loader import EvalLoader
from pretrain.derived import Split, analysis_choice, cache_dir, s3_settings
from pretrain.distributed import World, from_main, together
from pretrain.engine.base import Engine
from pretrain.errors import ConfigError
from pretrain.evaluations import AnalysisPlan, Evaluations, ProbePlan
from pretrain.metrics.reporter import Reporter
from pretrain.probes.choose import choose_samples, refuse_unfit
from pretrain.probes.falls import FallWatch
from pretrain.probes.suite import ProbeChoice
from pretrain.pulse import Pulse


@dataclass(frozen=True, kw_only=True)
class ProbeData:
    """The datasets of the probes, and the numbers of the samples that are looked at."""

    train: DatasetIndex
    val: DatasetIndex
    train_samples: npt.NDArray[np.int64]
    val_samples: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """What is looked at beside data.val; None for what the recipe does not ask for. analysis: whose images."""

    probes: ProbeData | None
    analysis: DatasetIndex | None


def open_evaluation_data(config: RunConfig, data: Data, *, world: World) -> EvaluationData:
    """All ranks together. Raises as _open_probe_data; UsageError where eval.analyze could not draw."""
    probes = _open_probe_data(config, data, world=world)
    analyze, analysis = config.eval.analyze, None
    if analyze is not None:
        from_main(world, lambda: require_matplotlib("eval.analyze"))
        url = analyze.images
        if url is not None:
            analysis = together(lambda: open_index(url, s3=s3_settings(config), cache_dir=cache_dir(config)))
        else:
            analysis = data.val_index or data.indexes[0]
    return EvaluationData(probes=probes, analysis=analysis)


def _open_probe_data(config: RunConfig, data: Data, *, world: World) -> ProbeData | None:
    """None for a recipe without probes. All ranks together.

    Raises ConfigError where the run's own data cannot serve and no other is named, UsageError for data that gives no
    honest number, and what reading an index raises.
    """
    probes = config.eval.probes
    if probes is None:
        return None
    train = _probe_index(config, probes.train, "train", list(data.indexes))
    val = _probe_index(config, probes.val, "val", [data.val_index] if data.val_index is not None else [])
    refuse_unfit(train, val)

    def chosen() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        found = []
        for index, count in ((train, probes.max_train_samples), (val, probes.max_val_samples)):
            table = open_samples(index, s3=s3_settings(config), cache_dir=cache_dir(config))
            found.append(choose_samples(np.asarray(table.labels), index.chunk_samples, count=count))
        return found[0], found[1]

    # Rank 0's: the samples file of a large dataset need not come to every node.
    train_samples, val_samples = from_main(world, chosen)
    return ProbeData(train=train, val=val, train_samples=train_samples, val_samples=val_samples)


def _probe_index(config: RunConfig, url: str | None, which: str, own: list[DatasetIndex]) -> DatasetIndex:
    if url is not None:
        return together(lambda: open_index(url, s3=s3_settings(config), cache_dir=cache_dir(config)))
    labelled = [index for index in own if index.num_classes is not None and index.label_kind != "multi"]
    if not labelled:
        why = f"data.{which} has no single label an image" if own else f"there is no data.{which}"
        raise ConfigError(
            f"eval.probes needs labelled images, and {why}; name a dataset: eval.probes.{which}=URL"
        )
    return labelled[0]


def build_evaluations(
    config: RunConfig,
    data: Data,
    evaluation_data: EvaluationData,
    engine: Engine,
    *,
    world: World,
    split: Split,
    workers: int,
    pulse: Pulse,
    reporter: Reporter,
    device_transform: DeviceTransform,
) -> Evaluations:
    def loader(
        index: DatasetIndex, samples: npt.NDArray[np.int64] | None = None, *, label_bits: int | None = None
    ) -> EvalLoader:
        return EvalLoader(
            reader=build_reader(config, index),
            samples=samples,
            transform=EvalTransform(
                image_size=config.model.image_size, decoder=resolve_decoder(config.data.decoder)
            ),
            batch_size=split.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            workers=workers,
            prefetch_bytes=config.data.prefetch_bytes,
            worker_timeout_seconds=config.data.worker_timeout_seconds,
            pin_memory=world.device.type == "cuda",
            num_label_bits=label_bits,
        )

    plan, probes, probe_data = None, config.eval.probes, evaluation_data.probes
    if probe_data is not None and probes is not None:
        num_classes = probe_data.train.num_classes
        assert num_classes is not None, "data without classes was refused"
        plan = ProbePlan(
            choice=probe_choice(probes),
            train=loader(probe_data.train, probe_data.train_samples),
            val=loader(probe_data.val, probe_data.val_samples),
            num_classes=num_classes,
            facts=_facts(probe_data),
            every_steps=probes.every_steps,
            at_start=probes.at_start if probes.at_start is not None else config.init_from is not None,
        )
    analyses, analyze, images = None, config.eval.analyze, evaluation_data.analysis
    if analyze is not None and images is not None:
        samples = spread_samples(np.asarray(images.chunk_samples), analyze.num_images)
        analyses = AnalysisPlan(
            what=analysis_choice(config),
            images=loader(images, samples),
            folder=Path(config.run_dir) / "analysis",
            every_steps=analyze.every_steps,
        )
    validation = None
    if data.val_index is not None:
        validation = loader(data.val_index, label_bits=num_label_bits(data, [data.val_index]))
    return Evaluations(
        engine,
        world=world,
        pulse=pulse,
        reporter=reporter,
        device_transform=device_transform,
        validation=validation,
        every_steps=config.eval.every_steps,
        use_ema=config.eval.use_ema,
        probes=plan,
        analyses=analyses,
        falls=FallWatch(continues=config.init_from is not None),
    )


def probe_choice(probes: ProbesConfig) -> ProbeChoice:
    return ProbeChoice(
        knn=probes.knn,
        knn_standardized=probes.knn_standardized,
        linear=probes.linear,
        few_shot=probes.few_shot,
        dense=probes.dense,
    )


def _facts(data: ProbeData) -> dict[str, Any]:
    """What a journal line says of them, so that only values of the same images are held against each other."""
    return {
        "train": data.train.url,
        "train_identity": data.train.identity,
        "train_chosen": len(data.train_samples),
        "val": data.val.url,
        "val_identity": data.val.identity,
        "val_chosen": len(data.val_samples),
    }
