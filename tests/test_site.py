"""The documentation site: its pages from other folders, and the reference of the commands."""

import dataclasses
import re

import pytest
import yaml
from test_docs import ROOT, load

from lopd.cli.commands import COMMANDS
from lopd.config.parse import flag

pages = load("pages")
COMMANDS_PAGE = pages.commands_page()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_flag_of_a_command(name):
    _, _, section = COMMANDS_PAGE.partition(f"\n### lopd {name}\n")
    section = re.split("\n##", section)[0]
    shown = re.findall(r"^\| `--([a-z0-9-]+)", section, re.MULTILINE)
    for item in dataclasses.fields(COMMANDS[name].config_class()):
        plain = flag(item.name).removeprefix("--")
        assert (plain in shown) != (f"no-{plain}" in shown), plain
    assert {"config", "rehash", "quiet", "help"} <= set(shown)


def test_cells_of_the_reference_hold_no_bars():
    for row in re.findall(r"^\| .*$", COMMANDS_PAGE, re.MULTILINE):
        assert len(re.split(r"(?<!\\)\|", row)) == 4, row


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("python.md", "../CHANGELOG.md", "changelog.md"),
        ("changelog.md", "docs/layout.md", "layout.md"),
        ("benchmarks.md", "NOTES.md", "speed.md"),
        ("speed.md", "README.md", "benchmarks.md"),
        ("how-to/extend.md", "../../CONTRIBUTING.md", "../contributing.md"),
        ("how-to/extend.md", "../design.md#codecs", "../design.md#codecs"),
        ("contributing.md", "README.md", "index.md"),
        ("index.md", "https://arxiv.org/abs/2604.13010", "https://arxiv.org/abs/2604.13010"),
    ],
)
def test_links_lead_to_pages_of_the_site(page, link, expected):
    assert pages.relinked(f"see [this]({link}).", page) == f"see [this]({expected})."


def test_every_page_stands_in_the_navigation():
    def names(entries):
        for entry in entries:
            (value,) = entry.values()
            yield from names(value) if isinstance(value, list) else [value]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    files = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(names(site["nav"])) == sorted(files | {*pages.ELSEWHERE, pages.COMMANDS_PAGE})
