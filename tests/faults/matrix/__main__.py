"""Play the fault matrix and write its table, tests/faults/README.md.

PYTHONPATH=.:tests python -m faults.matrix [--only WORDS] [--missing] [--plain-deepspeed] [--table]

Measurements are kept in measured.json, which MATRIX_MEASURE=1 has any run of these tests do. MATRIX_BESIDE=1 marks them
as of a machine that was busy with other work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from faults.matrix import measured, plain_deepspeed, table

TESTS = Path(__file__).resolve().parents[2]
ELSEWHERE = [  # tests of other folders that are rows as well
    "checkpoint/test_writer_ends.py::test_a_writer_killed_at_any_of_twenty_offsets_commits_nothing_and_another_takes_its_place"
]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m faults.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        metavar="WORDS",
        help="the rows that pytest's -k selects by these; signals, with --plain-deepspeed",
    )
    parser.add_argument(
        "--missing", action="store_true", help="only rows that are not measured as they are now"
    )
    parser.add_argument(
        "--plain-deepspeed", action="store_true", help="the signals under plain `deepspeed` instead"
    )
    parser.add_argument(
        "--table", action="store_true", help="play nothing, write the table of what is measured"
    )
    args = parser.parse_args()
    code = 0
    if args.plain_deepspeed:
        plain_deepspeed.measure(args.only)
    elif not args.table:
        suites = sorted(str(path) for path in (TESTS / "faults").glob("test_matrix*.py"))
        suites += [str(TESTS / test) for test in ELSEWHERE]
        # The table is tested when it has been written; "" is every mark.
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "",
            "--deselect",
            str((TESTS / "faults" / "test_matrix_table.py").relative_to(TESTS.parent)),
        ]
        command += ["-k", args.only] if args.only else []
        wanted = "missing" if args.missing else "1"
        code = subprocess.call(
            [*command, *suites], cwd=TESTS.parent, env={**os.environ, measured.VARIABLE: wanted}
        )
    table.write()
    print(f"wrote {table.README}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
