"""One row of the fault matrix, as data. Rows stand in rows_*.py, are played by player.py, printed by table.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from faults.matrix.runs import Run, Tree


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Where it shows that the fault was counted, or that there was none: one of the first four.

    metric: the highest value that Prometheus served. event: so many journal lines of it in all. exit_record: the
    attempt's, or its line in attempts.jsonl, has the row's code. shown: in the table's words, what a test of its own
    looks at.
    """

    metric: str = ""
    event: str = ""
    exit_record: bool = False
    shown: str = ""
    at_least: float = 1.0
    at_most: float = math.inf

    def __str__(self) -> str:
        if self.exit_record or self.shown:
            return self.shown or "exit record"
        what = f"`{self.metric}`" if self.metric else f"journal: `{self.event}`"
        return f"{what} stays 0" if self.at_most == 0 else what


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What playing a row gave, for the table. Seconds from the fault on."""

    fault: str
    outcome: str
    code: int
    bound_seconds: float
    noticed_seconds: float | None = None  # until somebody had written down that something is wrong
    ended_seconds: float | None = None  # until the last process of the attempt was gone
    recovered_seconds: float | None = None  # until the run was beyond where it had been
    counted: str = ""

    @property
    def as_json(self) -> Mapping[str, object]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the table that a test of its own shows; `fault` and `outcome` are the table's words."""

    fault: str
    outcome: str
    code: int
    bound_seconds: float
    counted: Counted | None = None

    def measured(
        self, *, noticed: float | None = None, ended: float | None = None, recovered: float | None = None
    ) -> Measured:
        """Seconds from the fault on. Raises AssertionError beyond the bound."""
        took = recovered if ended is None else ended
        assert took is not None
        assert took <= self.bound_seconds, f"took {took:.1f} s, promised are {self.bound_seconds:g} s"
        return Measured(
            fault=self.fault,
            outcome=self.outcome,
            code=self.code,
            bound_seconds=self.bound_seconds,
            noticed_seconds=noticed,
            ended_seconds=ended,
            recovered_seconds=recovered,
            counted=str(self.counted or ""),
        )


@dataclass(frozen=True, kw_only=True)
class Row(Entry):
    """A line that player.py plays.

    The fault is one of three: `strike`, from outside, when `when` holds; `injected` from inside, see
    injected/sitecustomize.py; or `prepare`, damage that is there before the run starts.

    code: of the attempt that it hits; 0: the run goes on. bound_seconds: from the fault to that attempt's end (to
    the next step, where the run goes on). A run that ended is started again, by its supervisor, or as a scheduler
    would where that does not (after `mend` where only that helps), unless `is_final`, and must end as the reference
    did: bitwise on as many ranks.
    """

    world_size: int = 2  # 0: one process, without a launcher
    zero_stage: int = 1
    changes: Tree = field(default_factory=dict)  # to the recipe
    begins_from: tuple[int, ...] = ()  # checkpoints of the reference that the run is given
    prepare: Callable[[Run], None] | None = None
    when: Callable[[Run], bool] | None = None
    strike: Callable[[Run], None] | None = None
    injected: tuple[Tree, ...] = ()
    mend: Callable[[Run], None] | None = None
    is_final: bool = False
    after: Callable[[Run], None] | None = None  # what else must be so at the end
    says: tuple[str, ...] = ()
    reference_changes: Tree = field(default_factory=dict)  # where the reference is not of the plain recipe
    reference_faults: tuple[Tree, ...] = ()  # what happens to the reference as well
    dataset: Callable[[Path], Path] | None = None  # writes the shards, where they are not the usual ones
    max_restarts: int | None = None  # by the supervisor; its default when left out
    shows_too: tuple[
        Entry, ...
    ] = ()  # further lines of the table that the same launch shows; `after` tells them apart
    fast: bool = False  # runs in `make test` too
