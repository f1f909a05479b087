"""What a run measures beside its training: loss and metrics on validation data, probes of its features, and figures.

Called by train.py between steps; built by assemble_evaluations.py. A run that is asked to stop gives up what is under
way between steps, so that it can save in the time it is left. Nothing here changes what is learned: no random
number of the training is drawn, no weight is touched, and the training data goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.analysis import figures
from pretrain.analysis.choice import What
from pretrain.data.augment import DeviceTransform
from pretrain.data.loader import EvalLoader, to_device
from pretrain.distributed import Sums, World, sum_over_ranks
from pretrain.engine.base import Engine
from pretrain.errors import AskedToStopError, DataError
from pretrain.metrics.journal import JOURNAL_NAME, read_events
from pretrain.metrics.reporter import Reporter
from pretrain.probes.falls import FallWatch, Measured
from pretrain.probes.features import Moved
from pretrain.probes.suite import ProbeChoice, ProbeLoader, ProbeResults, run_probes
from pretrain.pulse import Pulse

_LOOK_EVERY_BATCHES = 8  # for a request to stop: ranks must agree on it, which waits for the device


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What the probes of a run are, and on what. facts: of the data, for the journal. at_start: also before step 1."""

    choice: ProbeChoice
    train: ProbeLoader
    val: ProbeLoader
    num_classes: int
    facts: Mapping[str, Any]
    every_steps: int | None
    at_start: bool


@dataclass(frozen=True, kw_only=True)
class AnalysisPlan:
    """Which figures, of attention in which images: this rank's part, as many batches as on the others. Written to
    folder/step-…"""

    what: Sequence[What]
    images: Iterable[Mapping[str, Any]]
    folder: Path
    every_steps: int | None


class Evaluations:
    """Validation every `every_steps`, and the plans' probes and figures in their own steps; all at the end.

    All ranks together.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        world: World,
        pulse: Pulse,
        reporter: Reporter,
        device_transform: DeviceTransform,
        validation: EvalLoader | None,
        every_steps: int | None,
        use_ema: bool,
        probes: ProbePlan | None,
        analyses: AnalysisPlan | None,
        falls: FallWatch,
    ) -> None:
        """use_ema: validate the average of the weights as well, where the engine keeps one."""
        self._engine, self._world, self._pulse, self._reporter = engine, world, pulse, reporter
        self._device_transform = device_transform
        self._validation, self._every_steps = validation, every_steps
        self._use_ema = use_ema and engine.averages
        self._probes, self._analyses, self._falls = probes, analyses, falls
        self._asked: Callable[[], bool] | None = None  # None: what is under way is finished
        self._batches = 0  # as many on all ranks

    def begin(self, run_dir: Path, step: int, samples: int, *, asked: Callable[[], bool]) -> bool:
        """Before the first step of an attempt, `step` being done. asked: has this rank been asked to stop?

        False, on all ranks, when the probes before the run's first step were given up: they cannot be had once it
        is taken, and nothing is lost by beginning anew.
        """
        self._asked = asked
        if self._probes is None:
            return True
        if self._world.is_main and step:  # what the probes of earlier attempts came to
            records = read_events(run_dir / JOURNAL_NAME, ("probe", "start", "rollback"))
            self._falls.read(records, same=self._probes.facts, up_to_step=step)
        if step or not self._probes.at_start:
            return True
        return self._probe(step, samples)

    def go_back(self, step: int) -> None:
        """The run goes on from `step`."""
        self._falls.go_back(step)

    def between(self, step: int, samples: int) -> dict[str, float] | None:
        """What is due after `step`, which is not the last. Returns what validation found, on all ranks the same."""
        found = self._validate(step, samples) if is_due(step, self._every_steps) else None
        if self._probes is not None and is_due(step, self._probes.every_steps):
            self._probe(step, samples)
        if self._analyses is not None and is_due(step, self._analyses.every_steps):
            self._analyze(step, samples)
        return found

    def at_end(self, step: int, samples: int, *, done: bool = False) -> dict[str, float] | None:
        """After the last step, which is saved: nothing would be gained by giving up. done: what `between` does has been
        done after this step.
        """
        self._asked = None
        found = None if done else self._validate(step, samples)
        if not (done and self._probes is not None and is_due(step, self._probes.every_steps)):
            self._probe(step, samples)
        if not (done and self._analyses is not None and is_due(step, self._analyses.every_steps)):
            self._analyze(step, samples)
        return found

    def _validate(self, step: int, samples: int) -> dict[str, float] | None:
        if self._validation is None:
            return None
        self._pulse.at("validate", step)
        over = (self._engine, self._validation, self._device_transform)
        try:
            unreadable, results = validate(*over, each_batch=self._each_batch)
            if self._use_ema:
                with self._engine.averaged_weights():
                    _, of_average = validate(*over, each_batch=self._each_batch)
                results |= {f"ema_{name}": value for name, value in of_average.items()}
        except AskedToStopError:
            self._tell_given_up("validation", step, samples)
            return None
        self._reporter.validation(step=step, samples=samples, unreadable=unreadable, **results)
        return results

    def _probe(self, step: int, samples: int) -> bool:
        """False: given up."""
        plan, started = self._probes, time.monotonic()
        if plan is None:
            return True
        self._pulse.at("validate", step)
        try:
            results = probe(
                self._engine,
                plan,
                device_transform=self._device_transform,
                world=self._world,
                each_batch=self._each_batch,
                moved=self._moved,
            )
        except AskedToStopError:
            self._tell_given_up("probes", step, samples)
            return False
        found = []
        for name, top1 in results.top1.items():
            found += self._falls.add(name, Measured(step=step, top1=top1, samples=results.val_samples))
        self._reporter.probes(
            step=step,
            samples=samples,
            top1=results.top1,
            falls={str(fall): asdict(fall) for fall in found},
            falling=self._falls.falling,
            train_samples=results.train_samples,
            val_samples=results.val_samples,
            unreadable=results.unreadable,
            num_classes=plan.num_classes,
            seconds=round(time.monotonic() - started, 3),
            **plan.facts,
        )
        return True

    def _analyze(self, step: int, samples: int) -> None:
        plan, started = self._analyses, time.monotonic()
        if plan is None:
            return
        self._pulse.at("validate", step)
        backbone: Any = self._engine.module.backbone
        try:
            findings = figures.analyze(
                backbone,
                plan.what,
                batches=plan.images,
                device_transform=self._device_transform,
                device=self._engine.device,
                reading=self._engine.reading,
                each_batch=self._each_batch,
            )
        except AskedToStopError:
            self._tell_given_up("analysis", step, samples)
            return
        folder, error = plan.folder / f"step-{step:08d}", None
        if self._world.is_main:
            try:
                figures.write(findings, folder, title=f"{plan.folder.absolute().parent.name}, step {step:,}")
            except OSError as failed:  # pictures are not worth the end of a run
                error = str(failed)
        self._reporter.event(
            "analysis",
            note=f"step {step}: figures in {folder}"
            if error is None
            else f"step {step}: no figures: {error}",
            step=step,
            samples=samples,
            what=list(plan.what),
            folder=str(folder),
            images=findings.images,
            error=error,
            seconds=round(time.monotonic() - started, 3),
        )

    def _tell_given_up(self, what: str, step: int, samples: int) -> None:
        note = f"step {step}: asked to stop: the {what} under way is given up"
        self._reporter.event("evaluation_given_up", note=note, step=step, samples=samples, what=what)

    def _each_batch(self) -> None:
        """All ranks together, at each batch. Raises AskedToStopError, on all, when one was asked."""
        self._pulse.at("validate")
        self._batches += 1
        if self._asked is None or self._batches % _LOOK_EVERY_BATCHES != 1:
            return
        asked = torch.tensor(float(self._asked()), device=self._engine.device)
        if sum_over_ranks(asked).item():
            raise AskedToStopError("asked to stop")

    def _moved(self) -> None:
        """Between pieces of work that rank 0 does alone; it tells the others how that ends."""
        self._pulse.at("validate")
        if self._world.is_main and self._asked is not None and self._asked():
            raise AskedToStopError("asked to stop")


def is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def probe(
    engine: Engine,
    plan: ProbePlan,
    *,
    device_transform: DeviceTransform,
    world: World,
    each_batch: Moved,
    moved: Moved,
) -> ProbeResults:
    """The plan's probes of the network as it stands, the same on all ranks. each_batch, moved: as of run_probes."""
    backbone: Any = engine.module.backbone
    return run_probes(
        backbone,
        plan.choice,
        train=plan.train,
        val=plan.val,
        num_classes=plan.num_classes,
        device_transform=device_transform,
        world=world,
        reading=engine.reading,
        each_batch=each_batch,
        moved=moved,
    )


@torch.no_grad()
def validate(
    engine: Engine, loader: EvalLoader, device_transform: DeviceTransform, *, each_batch: Moved
) -> tuple[int, dict[str, float]]:
    """Mean loss and metrics over a dataset, each sample once, however many ranks there are.

    Images that do not decode are left out, and counted. Raises DataError when none does.
    """
    sums = Sums(engine.device)
    engine.module.eval()
    try:
        for host_batch in loader:
            each_batch()
            count = engine.module.count(host_batch)
            batch = to_device(host_batch, engine.device)
            images = device_transform(batch["images"])
            loss_sum, metric_sums = engine.forward(images, batch)
            sums.add(loss=loss_sum, count=count, images=batch["weights"].sum(), **metric_sums)
    finally:
        engine.module.train()
    sums.add(unreadable=len(loader.unreadable))
    totals = sums.over_ranks()
    unreadable, count, images_seen = int(totals.pop("unreadable")), totals.pop("count"), totals.pop("images")
    if not images_seen:
        raise DataError(
            f"none of the {unreadable} images of data.val decodes; run `pretrain data verify --decode` on it"
        )
    loss = totals.pop("loss") / count
    return unreadable, {"loss": loss, **{name: total / images_seen for name, total in totals.items()}}
