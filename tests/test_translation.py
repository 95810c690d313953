"""The two READMEs say the same: commands, code, links and numbers, part by part."""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

from tests.conftest import ROOT


def test_the_chinese_readme_says_what_the_english_one_says():
    english, chinese = parts(ROOT / "README.md"), parts(ROOT / "README_CN.md")
    ours, theirs = [facts(part) for part in english], [facts(part) for part in chinese]
    changes = []
    for kind, a, b, c, d in SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind != "equal":
            left, right = (Counter(sum(side, ())) for side in (ours[a:b], theirs[c:d]))
            changes.append(
                f"README.md has {opening(english[a:b])} with {sorted((left - right).elements())},\n"
                f"README_CN.md {opening(chinese[c:d])} with {sorted((right - left).elements())}"
            )
    assert not changes, "\n".join(changes)


def parts(page: Path) -> list[str]:
    """A page's headings, paragraphs, list items, table rows and fenced blocks, in order."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[\s\S]*?^```$|(?:^(?!```).+\n?)+", text, re.M)
    return [part for block in blocks for part in split_items(block)]


def split_items(block: str) -> list[str]:
    return [block] if block.startswith("```") else re.split(r"\n(?=\||- )", block.strip())


def facts(part: str) -> tuple[str, ...]:
    """What a translation must keep: commands, the tree's names; else code, links and numbers."""
    marks = ["not run here"] * len(re.findall(r"not\s+run\s+here|此处未运行", part))
    if part.startswith("```\n"):
        modules = {path.stem for path in (ROOT / "src").glob("*/*.py")}
        words = re.findall(r"[\w./]+", re.sub(r"\([^)]*\)|（[^）]*）", "", part), re.A)
        named = [word for word in words if word in modules or re.search(r"\w(\.py|\.sh|/)$", word)]
        return ("tree", *named, *marks)
    if part.startswith("```"):
        return (*(re.sub(r"(^|\s+)#.*", "", line) for line in part.splitlines()), *marks)
    kind = re.match(r"#+ |- |\||", part)[0]
    shape = kind * part.count("|") if kind == "|" else kind
    code = re.findall(r"`[^`]+`", part)
    links = re.findall(r"\]\([^)]+\)", part.replace("README_CN.md", "README.md"))
    prose = re.sub(r"`[^`]+`|\]\([^)]+\)", "", part)
    return (shape, *sorted(code + links + re.findall(r"\d+(?:[.,]\d+)*", prose)), *marks)


def opening(found: list[str]) -> str:
    return f"{len(found)} part(s) from {found[0][:60]!r}" if found else "nothing"
