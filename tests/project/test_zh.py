"""The Chinese pages say what the English ones say: section by section the same commands, names, numbers, links, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pages import (
    ROOT,
    Section,
    all_sections,
    chinese,
    english,
    linked_files,
    sections,
    translations,
)

from r1zero.config import legacy
from r1zero.config.load import FREE_KEYS, SECTIONS
from r1zero.config.schema import Correction, EntropyCtrl, KlCtrl
from r1zero.config.validate import field_names

PAGES = translations()
BOTH = PAGES + [english(page) for page in PAGES]
# Headings that are names.
NAMES = {"r1zero", "CPU"}
HAN = re.compile(r"[\u4e00-\u9fff]")
KEY = re.compile(
    r"(?<![\w/.])(training|actor_rollout|ref|reward|algorithm|resource_pool)\.([a-z0-9_]+(?:\.[a-z0-9_]+)*)"
)
# Wrong on purpose: the quick start shows what is said about it.
SHOWN_AS_UNKNOWN = {"algorithm.lr"}


def pairs(page: Path) -> Iterator[tuple[Section, Section]]:
    """The sections of a Chinese page with those of the English one."""
    return zip(sections(page), sections(english(page)), strict=True)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def in_english(text: str) -> str:
    """A name or path of a Chinese page as the English page has it."""
    return text.replace("docs/zh/", "docs/").replace("README.zh.md", "README.md")


@pytest.mark.parametrize("page", PAGES, ids=name)
class TestChinesePage:
    def test_headings_have_the_same_levels_in_the_same_order(self, page: Path) -> None:
        translated = [section.level for section in sections(page)]
        assert translated == [section.level for section in sections(english(page))]

    def test_headings_are_translated(self, page: Path) -> None:
        for section in sections(page):
            assert HAN.search(section.heading) or section.heading in NAMES

    def test_code_blocks_are_the_same_up_to_comments(self, page: Path) -> None:
        for ours, theirs in pairs(page):
            assert ours.code == theirs.code, ours.heading

    def test_the_same_names_stand_in_each_section(self, page: Path) -> None:
        for ours, theirs in pairs(page):
            assert {in_english(span) for span in ours.names} == theirs.names, ours.heading

    def test_the_same_numbers_stand_in_each_section(self, page: Path) -> None:
        for ours, theirs in pairs(page):
            assert ours.numbers == theirs.numbers, ours.heading

    def test_links_lead_to_the_same_files(self, page: Path) -> None:
        for ours, theirs in pairs(page):
            translated = [english(path) for path in linked_files(page, ours)]
            original = [english(path) for path in linked_files(english(page), theirs)]
            assert translated == original, ours.heading

    def test_tables_have_as_many_rows(self, page: Path) -> None:
        for ours, theirs in pairs(page):
            assert ours.tables == theirs.tables, ours.heading

    def test_text_is_chinese(self, page: Path) -> None:
        for section in sections(page):
            text = "".join(section.prose)
            assert HAN.search(text) or not text, section.heading

    def test_chinese_pages_lead_to_chinese_pages(self, page: Path) -> None:
        for section in sections(page):
            named = {(ROOT / span).resolve() for span in section.names if span.startswith("docs/")}
            for path in {*linked_files(page, section), *named} - {english(page)}:
                assert path == chinese(path) or not chinese(path).exists(), (
                    f"{path} in {section.heading}"
                )


@pytest.mark.parametrize("page", BOTH, ids=name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    folders = ("docs/", "tools/", "r1zero/", "configs/", "examples/", "tests/", "docker/")
    for section in sections(page):
        spans = [span for span in section.names if span.startswith(folders) and " " not in span]
        for path in [*linked_files(page, section), *(ROOT / span for span in spans)]:
            assert path.exists(), f"{path} in {section.heading}"


def test_keys_that_are_named_exist() -> None:
    found = set()
    for page, section in all_sections(BOTH):
        for text in [*section.names, *section.code]:
            for key in KEY.findall(text):
                found.add(".".join(key))
                assert exists(*key), f"{'.'.join(key)} in {name(page)}, {section.heading}"
    assert len(found) > 5


def exists(section: str, key: str) -> bool:
    """Whether a configuration may have this key."""
    first, _, below = key.partition(".")
    if f"{section}.{key}" in SHOWN_AS_UNKNOWN:
        return True
    if first in ("settings", "loss_settings", "map_keys"):
        return True
    sections_below = {"kl_ctrl": KlCtrl, "entropy_ctrl": EntropyCtrl, "correction": Correction}
    if first in sections_below and below:
        return below in field_names(sections_below[first])
    known = field_names(SECTIONS[section])
    if section == "reward":
        known |= set(legacy.REWARD_SETTINGS)
    if section in ("training", "actor_rollout", "ref"):
        known |= FREE_KEYS
    return first in known
