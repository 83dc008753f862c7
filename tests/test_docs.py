"""What the documents say: tables are the committed rows, examples run, names exist."""

import re
import shlex
from pathlib import Path

import pytest

import lopd_kernels
from benchmarks import readme
from lopd.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_committed_rows():
    assert readme.rendered(README) == README, "run python -m benchmarks.readme"


def test_the_library_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    loss, entropy = map(float, capsys.readouterr().out.split())
    assert loss > 0 and entropy > 0


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:linear|sparse)_\w+)`", README))))
def test_functions_that_are_named_exist(name):
    assert callable(getattr(lopd_kernels, name))


@pytest.mark.parametrize("line", re.findall(r"^lopd .*$", README, re.MULTILINE))
def test_commands_that_are_shown_parse(line, monkeypatch):
    from lopd import cli

    command, *flags = shlex.split(line, comments=True)[1:]
    assert command in COMMANDS
    module_name, class_name, _ = COMMANDS[command]
    module = __import__(f"lopd.stages.{module_name}", fromlist=[class_name])
    seen = []
    monkeypatch.setattr(module, "main", seen.append)
    cli.run([command, *flags])
    assert isinstance(seen[0], getattr(module, class_name))


@pytest.mark.parametrize(
    "target", ["demo", "test", "test-all", "test-vllm", "lint", "demo-seeds", "bench-live"]
)
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_file_that_is_named_exists():
    for document in ("README.md", "CONTRIBUTING.md", "docs/design.md", "benchmarks/README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:lopd|lopd_kernels|docs|benchmarks|tests)/[\w./]+)`", text):
            assert (ROOT / name).exists(), f"{document} names {name}"
