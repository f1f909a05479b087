from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from launching import ROOT, clean_environment

from pretrain.benchmarks.shuffle import chi_square
from pretrain.cli import main


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["benchmark", *arguments, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("excluded", ["0", "1e5"])
def test_an_epoch_of_a_hundred_million_samples_costs_little_time_and_memory(excluded: str) -> None:
    """A tenth of 1e9 samples against a tenth of its promise, in a process of its own; time with room to spare."""
    command = [sys.executable, "-m", "pretrain.cli", "benchmark", "order", "--samples", "1e8", "--json"]
    done = subprocess.run(
        [*command, "--excluded", excluded], capture_output=True, text=True, env=clean_environment(), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mode"] == "lanes"
    assert found["epoch_table_seconds"] < 2
    assert found["microseconds_a_position_in_batches"] < 30
    assert found["gigabytes_at_most"] < 0.05 + 0.05  # a tenth of 0.5 GB, and what does not shrink with it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["order", "--samples", "0"], "--samples must be at least 1"),
        (["order", "--samples", "10", "--lanes", "3"], "--lanes must be even"),
        (["order", "--samples", "10", "--excluded", "10"], "leaves none"),
        (["shuffle", "--samples", "10"], "at least one batch"),
        (["shuffle", "--global-batch-size", "7"], "even"),
        (["shuffle", "--classes", "1"], "--classes must be at least 2"),
    ],
)
def test_wrong_numbers_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["benchmark", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_chi_square_is_that_of_the_definition() -> None:
    labels = np.array([0, 0, 1, 1, 0, 1, 0, 1])
    assert chi_square(labels, 2, 4) == 0  # both groups hold two of each
    assert chi_square(np.sort(labels), 2, 4) == pytest.approx(4)  # 4 of one class where 2 are expected: 2 + 2
    rng = np.random.default_rng(0)
    assert chi_square(rng.integers(0, 50, 100_000), 50, 500) == pytest.approx(1, abs=0.1)


def test_small_data_is_mixed_as_by_a_full_permutation_and_packing_does_it_for_large_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = rows(capsys, "shuffle", "--samples", "20000", "--classes", "100", "--chunk-samples", "256")
    large = rows(
        capsys,
        *("shuffle", "--samples", "300000", "--classes", "300", "--chunk-samples", "16"),
        *("--global-batch-size", "512"),
    )
    ours, packed, stored, permuted = (row["chi2_df_a_batch"] for row in small)
    assert small[0]["order"].startswith("permutation")
    assert stored > 100
    assert ours == pytest.approx(permuted, abs=0.15)
    assert packed == pytest.approx(permuted, abs=0.15)
    ours, packed, stored, permuted = (row["chi2_df_a_batch"] for row in large)
    assert large[0]["order"] == "256 lanes"
    assert stored > 100
    assert packed == pytest.approx(permuted, abs=0.05)
    assert permuted < ours < 3  # sorted data of lanes alone: good within a batch, and no better
    assert large[0]["chi2_df_a_stretch"] > 3 * large[1]["chi2_df_a_stretch"]
