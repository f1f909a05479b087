"""README.md: its tables render, its links lead somewhere, and its tree is the one that is there."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
TREE = README[README.index("```\npretrain/") : README.index("```\n\nA batch from tar to optimizer")]


def test_every_table_has_a_header_and_rows_of_as_many_cells() -> None:
    lines = PROSE.split("\n")
    starts = [i for i, (before, line) in enumerate(pairwise(["", *lines])) if line[:1] == "|" != before[:1]]
    assert len(starts) > 10
    for start in starts:
        rule = lines[start + 1]
        assert re.fullmatch(r"(\|-+)+\|", rule), f"no header row above {lines[start]}"
        for row in lines[start:]:
            if not row.startswith("|"):
                break
            assert len(re.findall(r"(?<!\\)\|", row)) == rule.count("|"), row


def test_every_link_leads_to_a_section_or_a_file() -> None:
    titles = re.findall(r"^##+ (.*)$", PROSE, flags=re.MULTILINE)
    # as GitHub makes an anchor of a title
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(([^)]+)\)", PROSE)
    assert links
    for link in links:
        assert link.removeprefix("#") in anchors if link.startswith("#") else (ROOT / link).exists(), link


def test_every_section_stands_in_the_contents() -> None:
    titles = re.findall(r"^## (.*)$", PROSE, flags=re.MULTILINE)
    contents = PROSE[: PROSE.index("\n## ")]
    assert re.findall(r"\[([^\]]+)\]\(#", contents) == titles


def test_the_tree_names_what_is_there() -> None:
    named = set(re.findall(r"[\w/]+\.py|\w+/", TREE))
    package = ROOT / "pretrain"
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert there <= named, f"not in the tree: {sorted(there - named)}"
    everywhere = {path.name for path in package.rglob("*.py")}
    gone = {name for name in named if name.endswith(".py")} - everywhere
    assert not gone, f"in the tree alone: {sorted(gone)}"
