"""One attempt of a run on this node: its ranks, and how it ended. Used by restarts.py and agent.py."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.family import (
    Family,
    Link,
    Patience,
    Rank,
    code_that_counts,
    end_all,
    how_it_ended,
    relay_output,
    start_ranks,
)
from launch.inbox import Inbox
from launch.processes import become_subreaper, children_of
from pretrain.checkpoint.attempts import After, look_after, look_before
from pretrain.checkpoint.run_directory import FINISHED
from pretrain.errors import EXIT_CRASHED, EXIT_CTRL_C, EXIT_FINISHED, EXIT_INTERRUPTED, LostPeerError

NOT_RESTARTED = (2, 3, 4)  # usage, data, checkpoint: the causes that a restart would only meet again
_LONGEST_REASON = 500


def exit_code(codes: Sequence[int], *, ctrl_c: bool, terminated: bool, finished: bool) -> int:
    """One exit code from those of the ranks (negative: ended by that signal).

    A cause that a restart would meet again (2 to 4) comes first, then Ctrl-C (130), an interruption
    (75), a crash (1). 0 is for a run whose ranks all ended with 0 and that is recorded as finished.
    """
    for code in NOT_RESTARTED:
        if code in codes:
            return code
    if finished and all(code == EXIT_FINISHED for code in codes):
        return EXIT_FINISHED
    if ctrl_c or EXIT_CTRL_C in codes:
        return EXIT_CTRL_C
    if terminated or EXIT_INTERRUPTED in codes:
        return EXIT_INTERRUPTED
    return EXIT_CRASHED


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a rank ended. `code`: negative for a signal. `after_seconds`: since the attempt began."""

    rank: int
    host: str
    code: int
    reason: str
    after_seconds: float
    ended_by_us: bool = False
    lost_peer: bool = False  # another one began it


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended. `lost`: in words, a host that was lost with its `lost_ranks`; `left`: what is in the
    run's folder, None where there is none to look at."""

    ended: tuple[Ended, ...]
    ctrl_c: bool = False
    terminated: bool = False
    finished: bool = True
    lost: str | None = None
    lost_ranks: int = 0
    left: After | None = None

    @property
    def exit_code(self) -> int:
        codes = [code_that_counts(each.code, ended_by_us=each.ended_by_us) for each in self.ended]
        if self.lost is not None:
            codes.append(EXIT_CRASHED)
        return exit_code(codes, ctrl_c=self.ctrl_c, terminated=self.terminated, finished=self.finished)

    @property
    def asked_to_stop(self) -> bool:
        return self.ctrl_c or self.terminated

    def began(self) -> Ended | None:
        """The rank that the attempt's end began with: the first to fail, but not of those that only lost a peer or
        were ended, while there is another. None when a host was lost, and with it the rank."""
        failures = [each for each in self.ended if each.code != EXIT_FINISHED]
        whole = self.exit_code
        first = min(
            failures,
            key=lambda each: (
                each.lost_peer or each.ended_by_us,
                whole in NOT_RESTARTED and each.code != whole,
                each.after_seconds,
            ),
            default=None,
        )
        if first is not None and self.lost is not None and (first.lost_peer or first.ended_by_us):
            return None
        return first

    def reason(self) -> str:
        if self.exit_code == EXIT_FINISHED:
            return "finished"
        began = self.began()
        if began is None and self.lost is not None:
            return self.lost
        if began is None:
            return f"every rank ended with exit code 0, but {FINISHED} is not there: the run is not finished"
        return f"rank {began.rank} on {began.host}: {began.reason}"


def run_ranks(
    command: Sequence[str],
    *,
    environments: Sequence[Mapping[str, str]],
    inbox: Inbox,
    run_dir: Path | None = None,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    link: Link | None = None,
    records_end: bool = True,
) -> Outcome:
    """Run `command` once for each whole environment, as the rank that its RANK says, and wait for all.

    - SIGTERM, SIGUSR1 or SIGHUP goes to all ranks as SIGTERM, Ctrl-C as SIGINT; they have
      `patience.save_seconds` to save and end. A second Ctrl-C kills them at once.
    - When a rank fails, the others have `peer_seconds` to notice by themselves, then get SIGTERM,
      and `kill_seconds` later SIGKILL.
    - Rank 0 writes to our own stdout and stderr; what the others write comes to stderr, each line
      after `[rank N]`.

    How a rank ended is what it recorded in `run_dir`, else how its process did. records_end: ranks that all end with 0
    are believed only where the run is recorded as finished there. Leaves no process behind: whatever
    the ranks started is ended as well. For the main thread of a Linux process. Raises OSError when the command cannot
    be started.
    """
    spared = children_of(os.getpid())  # not ours to end
    was_subreaper = become_subreaper()
    before = look_before(run_dir) if run_dir else None
    began = time.monotonic()
    ranks: list[Rank] = []
    try:
        start_ranks(command, environments, inbox, ranks)
        relays = relay_output(ranks)
        family = Family(ranks, spared=spared, patience=patience, link=link)
        family.wait(inbox)
        end_all(ranks, spared)
        for each in relays:
            each.join(timeout=5.0)
    finally:
        end_all(ranks, spared)
        become_subreaper(was_subreaper)
    left = look_after(run_dir, before) if run_dir and before else None
    records = left.records if left else {}
    return Outcome(
        ended=tuple(_ended(rank, records.get(rank.number), began) for rank in ranks),
        ctrl_c=family.ctrl_c_count > 0,
        terminated=family.terminated,
        finished=left is None or left.finished or not records_end,
        left=left,
    )


def _ended(rank: Rank, record: Mapping[str, Any] | None, began: float) -> Ended:
    assert rank.exit_code is not None, f"rank {rank.number} is still running"
    code, reason, lost_peer = rank.exit_code, how_it_ended(rank.exit_code), False
    # Another rank of that number may have written there: under a host name of its own, one that this host does not see.
    if record is not None and record.get("pid", rank.process.pid) == rank.process.pid and record["code"]:
        # The process may have been killed after it had said how it ended, and its launcher never gets to hear the rest.
        code, reason = int(record["code"]), str(record["reason"])[:_LONGEST_REASON]
        lost_peer = record.get("error") == LostPeerError.__name__
    return Ended(
        rank=rank.number,
        host=socket.gethostname(),
        code=code,
        reason=reason,
        after_seconds=rank.ended_at - began,
        ended_by_us=rank.ended_by_us,
        lost_peer=lost_peer,
    )
