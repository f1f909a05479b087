"""Print what becomes of each damaged tar, next to plain webdataset with its defaults.

    python tests/faults/damage_table.py [--markdown]

training: the epoch of a run whose index was made before the damage. index: what an index made afterwards, of the
damaged tar alone, says. webdataset: samples with image and label, of 40.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from faults.damage import CASES, Bench  # noqa: E402 - found only now


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", action="store_true", help="as a table for a document")
    args = parser.parse_args()
    columns = ("damage", "training", "verify", "index", "webdataset")
    line = "| {} | {} | {} | {} | {} |" if args.markdown else "{:<52} {:<12} {:<11} {:<8} {}"
    print(line.format(*columns))
    if args.markdown:
        print("|---|---|---|---|---|")
    trainings: Counter[str] = Counter()
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "bench")
        for name, damage in CASES.items():
            found = bench.run(damage)
            trainings[found.training.split()[0]] += 1
            silent += not found.webdataset.startswith("40 ") and found.webdataset.endswith("no error")
            row = (name, found.training, found.verify, found.indexing, found.webdataset)
            print(line.format(*row), flush=True)
    said = ", ".join(f"{count} {word}" for word, count in trainings.most_common())
    print(
        f"\n{len(CASES)} cases; training: {said}; webdataset: {silent} with samples missing or doubled and no error"
    )
    return 1 if trainings["SILENT"] else 0


if __name__ == "__main__":
    sys.exit(main())
