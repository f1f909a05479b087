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

ELASTIC = Entry(
    fault="4 → 2 → 3 ranks, ZeRO 1 → 3 → 2",
    outcome="the state is bitwise the same when loaded, the losses within 1e-5",
    code=75,
    bound_seconds=30.0,
)
SEVEN = Entry(
    fault="8 → 7 ranks at a global batch of 64",
    outcome="the state is bitwise the same when loaded, ten losses within 1e-5",
    code=75,
    bound_seconds=120.0,
)
PARTITION = Entry(
    fault="a network partition between two hosts",
    outcome="both sides end; only one writes",
    code=137,
    bound_seconds=15.0,
)
CRASH_LOOP = Entry(
    fault="a crash at the same step, again and again",
    outcome="the supervisor gives up after `--max-restarts` restarts without progress",
    code=1,
    bound_seconds=120.0,
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
