"""Rows: numbers gone wrong, and ranks that come and go."""

from __future__ import annotations

from faults.matrix.row import Counted, Entry, Row
from faults.matrix.runs import BATCH

NAN_ON_ONE = {"do": "multiply", "at": "loss", "step": 10, "factor": "nan"}
SPIKED = (17 * BATCH, 18 * BATCH)  # positions: of step 18
SOON_CALLED_SLOW = {"watchdog": {"slow_rank_steps": 8, "slow_rank_seconds": 1.0}}
SPIKE = {"train": {"spike": {"window_steps": 8, "threshold": 8.0, "skip_steps": 2}}}

NUMBERS = [
    Row(
        fault="a loss that is not a number, on one rank",
        outcome="all ranks skip that same update, counted",
        injected=({**NAN_ON_ONE, "rank": 1},),
        # Whichever rank it is on, the same update is skipped.
        reference_faults=({**NAN_ON_ONE, "rank": 0},),
        code=0,
        bound_seconds=10.0,
        counted=Counted(metric="pretrain_steps_skipped_total"),
        fast=True,
    ),
]

SPIKE_ROW = Entry(
    fault="a loss ten times as high",
    outcome="back to the checkpoint before it, on with the positions after it; the skip is committed first",
    code=0,
    bound_seconds=30.0,
    counted=Counted(metric="pretrain_loss_spikes_total"),
)
FLIPPED_WEIGHT = Entry(
    fault="one bf16 weight flipped on one of three ranks",
    outcome="found before the next forward that is checked, the rank named; back beyond the last good check",
    code=0,
    bound_seconds=30.0,
    counted=Counted(metric="pretrain_replica_mismatches_total"),
)
SLOW_RANK = Entry(
    fault="a rank slower by 200 ms a step",
    outcome="named by its compute time before the first collective; nothing else changes",
    code=0,
    bound_seconds=120.0,
    counted=Counted(metric="pretrain_slow_ranks"),
)

RANKS_TOLD = Counted(shown="`pretrain report`: ranks")
ELASTIC = Entry(
    fault="4 → 2 → 3 ranks, ZeRO 1 → 3 → 2",
    outcome="4 ranks are told to stop, then 2; each time the state is bitwise the same when loaded, ten losses of the "
    "others within 1e-5 of 4 ranks that went on",
    code=75,
    bound_seconds=30.0,
    counted=RANKS_TOLD,
)
SEVEN = Entry(
    fault="8 → 7 ranks at a global batch of 64",
    outcome="8 ranks are told to stop; the state is bitwise the same when 7 load it, ten losses within 1e-5 of 8 ranks "
    "that went on",
    code=75,
    bound_seconds=30.0,
    counted=RANKS_TOLD,
)
PARTITION = Entry(
    fault="a network partition between two hosts",
    outcome="both sides end, by their watchdogs; only one writes; with the cable mended and both started again, by "
    "hand, the run goes on",
    code=137,
    bound_seconds=15.0,
    counted=Counted(event="watchdog"),
)
CRASH_LOOP = Entry(
    fault="a crash at the same step, again and again",
    outcome="the supervisor gives up after `--max-restarts` (here 2) restarts without progress",
    code=1,
    bound_seconds=120.0,
    counted=Counted(metric="pretrain_attempt", at_least=3, at_most=3),
)

ROWS: list[Entry] = [
    *NUMBERS,
    SPIKE_ROW,
    FLIPPED_WEIGHT,
    SLOW_RANK,
    ELASTIC,
    SEVEN,
    PARTITION,
    CRASH_LOOP,
]
