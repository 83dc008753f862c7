"""The documentation site: its pages from other folders, and the reference of the commands."""

import dataclasses
import re

import pytest
import yaml
from test_docs import ROOT, TEXTS, load

import lopd_kernels
from lopd.cli.commands import COMMANDS
from lopd.config.parse import flag

pages = load("pages")
COMMANDS_PAGE = pages.commands_page()
OF_OTHERS = {  # flags of other tools
    "docs/design.md": {"update"},
    "docs/evidence.md": {"part", "only", "plan", "again", "sample"},  # of benchmarks.evidence
    "docs/losses.md": {"repo-id"},  # of kernel-builder
    "docs/how-to/many-nodes.md": {"parsable", "dependency", "gpus"},
    "docs/pipeline.md": {"no-deps"},  # of pip
    "docs/moving-from/lightning-opd.md": {"compute-teacher-logprobs"},
}


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
        ("how-to/extend.md", "../formats.md#codecs", "../formats.md#codecs"),
        ("contributing.md", "README.md", "index.md"),
        ("index.md", "https://arxiv.org/abs/2604.13010", "https://arxiv.org/abs/2604.13010"),
    ],
)
def test_links_lead_to_pages_of_the_site(page, link, expected):
    assert pages.relinked(f"see [this]({link}).", page) == f"see [this]({expected})."


FLAGS = {
    flag(name).removeprefix("--")
    for command in COMMANDS.values()
    for field in dataclasses.fields(command.config_class())
    for name in (field.name, f"no_{field.name}")
} | {"config", "rehash", "quiet", "help", "json"}


@pytest.mark.parametrize(
    "page", [name for name in TEXTS if name.startswith("docs/") and name != "docs/reliability.md"]
)
def test_flags_in_the_guide_exist(page):
    text = re.sub(r"^(?:torchrun|python|pip|make) .*$", "", TEXTS[page], flags=re.MULTILINE)
    found = re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)
    assert {name.replace("_", "-") for name in found} - FLAGS <= OF_OTHERS.get(page, set())


def test_the_settings_of_trl_exist():
    trl = pytest.importorskip("trl")  # part of the test extra
    from trl.experimental.gkd import GKDConfig
    from trl.experimental.server_distillation import ServerDistillationConfig

    configs = (GKDConfig, ServerDistillationConfig, trl.DistillationConfig, trl.SFTConfig)
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    table = TEXTS["docs/moving-from/trl.md"].split("| --- | --- |")[1].split("\n\n")[0]
    for row in table.strip().splitlines():
        left = row.split("|")[1]
        for name in re.findall(r"`(?:0 < )?([a-z0-9_]+)[^`]*`", left):
            assert name in known, f"TRL has no {name}"


def test_every_page_stands_in_the_navigation():
    def names(entries):
        for entry in entries:
            (value,) = entry.values()
            yield from names(value) if isinstance(value, list) else [value]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    files = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(names(site["nav"])) == sorted(files | {*pages.ELSEWHERE, pages.COMMANDS_PAGE})


def test_the_reference_of_the_losses_has_every_public_name():
    listed = re.findall(r"^        - (\w+)$", TEXTS["docs/reference/losses.md"], re.MULTILINE)
    assert sorted(listed) == sorted(lopd_kernels.__all__)
