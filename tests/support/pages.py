"""Pages of the documentation, read section by section; Chinese ones and the English ones they translate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CHINESE = DOCS / "zh"

HEADING = re.compile(r"(#+) (.*)")
NUMBER = re.compile(r"\d+(?:[.,]\d+)+|\d\d+")
CODE_SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
COMMENT = re.compile(r"(^|\s+)# .*")


@dataclass
class Section:
    """What stands between a heading and the next."""

    heading: str
    level: int
    code: list[str] = field(default_factory=list)  # lines of code blocks, without comments
    prose: list[str] = field(default_factory=list)  # all other lines
    tables: list[int] = field(default_factory=list)  # rows of each

    @property
    def names(self) -> set[str]:
        """What is set as code within the text."""
        text = " ".join(self.prose)
        return {" ".join(span.split()) for span in CODE_SPAN.findall(text)}

    @property
    def numbers(self) -> set[str]:
        """Numbers of two digits or more that stand in the text, not in code; smaller ones may be words."""
        text = re.sub(r"`[^`]+`|\]\([^)]+\)", " ", " ".join(self.prose))
        return set(NUMBER.findall(text))

    @property
    def links(self) -> list[str]:
        """Targets as they are written, in their order, those of pictures included."""
        return LINK.findall(" ".join(self.prose))


def sections(page: Path) -> list[Section]:
    """The sections of a page. Code blocks are those that are indented by four."""
    found: list[Section] = []
    in_table = False
    for line in page.read_text().split("\n"):
        if heading := HEADING.fullmatch(line):
            found.append(Section(heading[2], len(heading[1])))
            in_table = False
            continue
        section = found[-1]
        if line.startswith("    "):
            if code := COMMENT.sub("", line.rstrip()):
                section.code.append(code)
            continue
        section.prose.append(line)
        is_row = line.startswith("|")
        if is_row and not in_table:
            section.tables.append(0)
        if is_row:
            section.tables[-1] += 1
        in_table = is_row
    return found


def translations() -> list[Path]:
    """All Chinese pages."""
    return [ROOT / "README.zh.md", *sorted(CHINESE.glob("*.md"))]


def english(path: Path) -> Path:
    """The English page that a Chinese one translates; any other path stays."""
    if path == ROOT / "README.zh.md":
        return ROOT / "README.md"
    if path.parent == CHINESE:
        return DOCS / path.name
    return path


def chinese(path: Path) -> Path:
    """Where the Chinese page of an English one is, if there is one."""
    if path == ROOT / "README.md":
        return ROOT / "README.zh.md"
    if path.parent == DOCS and path.suffix == ".md":
        return CHINESE / path.name
    return path


def linked_files(page: Path, section: Section) -> list[Path]:
    """Files that a section links to, in their order."""
    return [(page.parent / link).resolve() for link in section.links if not link.startswith("http")]


def all_sections(pages: list[Path]) -> Iterator[tuple[Path, Section]]:
    for page in pages:
        for section in sections(page):
            yield page, section
