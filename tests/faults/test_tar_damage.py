"""No damage to a tar shortens an epoch in silence: each case is refused, named, replaced by rule, or harmless."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from faults.damage import CASES, COUNT, DAMAGED, PER_SHARD, Bench, Damage, Layout, command, epoch

from pretrain.data.framer import split_name

HARMLESS = {  # bytes that no chunk holds: verify names them, training never reads them
    "cut off the end mark",
    "a bit flipped in the end mark",
    "two tars in one file",
    "bytes after the end",
    "zeros after the end",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("damage") / "bench")


def sound_samples(data: bytes) -> int:
    """How many samples with an image Python's tarfile finds; an error for a tar that is damaged in itself."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=False, errorlevel=2) as archive:
        parts = [split_name(info.name) for info in archive.getmembers() if info.isfile()]
    return len({key for part in parts if part for key, suffix in [part] if suffix == "jpg"})


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60
    assert sum(name.startswith("#") for name in CASES) >= 20


def test_the_reference_epoch_is_whole(bench: Bench) -> None:
    assert len(bench.reference) == COUNT == len(set(bench.reference.values()))
    assert epoch(bench.folder / "sound") == (bench.reference, {})


@pytest.mark.parametrize(("name", "damage"), CASES.items(), ids=CASES)
def test_damage_is_never_silent(bench: Bench, name: str, damage: Damage) -> None:
    found = bench.run(damage)
    # A run on it: ends with exit code 3 naming the shard, or sees every sample as it was.
    assert found.training == ("harmless" if name in HARMLESS or not found.changed else "refused")
    if found.training == "refused":
        assert DAMAGED in found.training_said
        assert "pretrain data verify" in found.training_said
    # verify: every difference has its name.
    assert found.verify == ("named" if found.changed else "as indexed"), found.verify_said
    if found.changed:
        assert DAMAGED in found.verify_said
    assert "Traceback" not in found.verify_said + found.indexing_said
    # An index made of it afterwards: refused, or of a tar that is sound in itself, with what it holds said.
    if found.indexing == "refused":
        names_it = (DAMAGED, "no samples found", "samples have no label")
        assert any(words in found.indexing_said for words in names_it), found.indexing_said
    else:
        data = damage(bench.sound)
        assert int(found.indexing) == sound_samples(data)
        assert f"indexed {found.indexing} samples" in found.indexing_said


def test_an_image_spoilt_before_the_index_was_made_is_replaced_and_named(tmp_path: Path) -> None:
    """The index vouches for bytes that do not decode: the one kind of damage that training gets by."""
    bench = Bench(tmp_path / "bench")
    layout = Layout.of(bench.sound)
    spoilt = bytearray(bench.sound)
    for number in (3, 21, 41):  # images: every second member
        start, end = layout.members[number][1:]
        spoilt[start : start + 300] = bytes(min(300, end - start))
    folder = tmp_path / "spoilt"
    shutil.copytree(bench.folder / "sound", folder)
    (folder / DAMAGED).write_bytes(spoilt)
    code, said = command("data", "index", folder, "--chunk-samples", 8, "--overwrite")
    assert code == 0
    assert "3 images are neither JPEG, PNG nor WebP" in said
    seen, replaced = epoch(folder)
    keys = [f"s{PER_SHARD + number // 2:05d}" for number in (3, 21, 41)]
    assert sorted(replaced.values()) == keys
    assert seen.keys() == bench.reference.keys()
    same = {g for g in seen if seen[g] == bench.reference[g]}
    assert same == bench.reference.keys() - replaced.keys()
    code, said = command("data", "verify", folder)
    assert code == 3
    assert all(key in said for key in keys)
