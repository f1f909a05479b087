"""The Dockerfile, read: what of it can be held without building an image, which no test here can."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest
from launching import ROOT
from manifests import checkov

from launch.manifest import FOLDER

TEXT = (FOLDER / "Dockerfile").read_text()
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==([^;\s]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def instructions() -> list[tuple[str, str]]:
    """(its word, the rest), lines that go on joined, build arguments as they are by default."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    found = [tuple(line.split(None, 1)) for line in joined.splitlines() if line]
    defaults = dict(rest.split("=", 1) for word, rest in found if word == "ARG")
    return [(word, re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], rest)) for word, rest in found]


def of(word: str) -> list[str]:
    return [rest for each, rest in instructions() if each == word]


def commands(program: str) -> list[str]:
    """All of the RUN lines that begin so."""
    each = [part.strip() for rest in of("RUN") for part in rest.split("&&")]
    return [command for command in each if command.startswith(program)]


def test_the_base_image_is_one_patch_release_or_a_digest() -> None:
    (base,) = of("FROM")
    assert re.search(r":\d+\.\d+\.\d+-[\w-]+$|@sha256:[0-9a-f]{64}$", base), base
    assert "--build-arg DIGEST=@sha256:" in TEXT  # can be given, and that is said


def test_it_runs_as_a_number_that_is_not_roots() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", of("USER")[-1])
    assert [word for word, _ in instructions()].index("USER") > max(
        number for number, (word, _) in enumerate(instructions()) if word == "RUN"
    )


def test_the_compilers_that_triton_and_inductor_need_at_run_time_stay_in_the_image() -> None:
    (installed,) = commands("apt-get install")
    assert {"gcc", "g++", "libc6-dev"} <= set(installed.split())
    assert not commands("apt-get remove") + commands("apt-get purge") + commands("apt-get autoremove")


def test_every_package_of_pips_is_the_one_that_was_tested() -> None:
    installing = commands("pip install")
    assert len(installing) == len(re.findall(r"pip\S* install", " ".join(of("RUN")))) >= 2
    for command in installing:
        assert "-c constraints.txt" in command, command
    asked = [word for command in installing for word in command.split() if "==" in word]
    for name, version in (word.split("==") for word in asked):
        assert CONSTRAINTS[name] == version
    # What builds packages is among them: pip would fetch the newest for a build of its own.
    building = {"setuptools", "torch"}
    assert building <= CONSTRAINTS.keys()
    first, *later = installing
    assert building <= {word.split("==")[0] for word in first.split()}
    assert all("--no-build-isolation" in command for command in later)


def test_what_is_copied_is_there_and_let_through() -> None:
    ignored = [
        line for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert ignored[0] == "*"
    let_through = [line[1:] for line in ignored if line.startswith("!")]
    copied = [name.removeprefix("./") for rest in of("COPY") for name in rest.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert any(fnmatch(name, pattern) for pattern in let_through), name
    assert {"pretrain", "launch", "data_tools", "k8s", "configs", "constraints.txt"} <= set(copied)
    assert "BuildKit" in TEXT  # an older builder would not read the list, and send all that is there


@pytest.mark.slow
def test_the_security_scan_of_the_dockerfile_finds_only_what_is_argued() -> None:
    report = checkov("dockerfile", FOLDER / "Dockerfile")
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 3
    found = {failed["check_id"] for failed in report["results"]["failed_checks"]}
    assert found == {"CKV_DOCKER_2"}
    assert all(check in (FOLDER / "README.md").read_text() for check in found)
