"""Help: complete, 80 columns wide, and without the imports of the stages."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from lopd.cli import main
from lopd.cli.commands import COMMANDS
from lopd.config.fields import GROUPS
from lopd.config.run import RECIPE
from lopd.config.strict_yaml import load_yaml
from lopd.stages import run

DOCS = Path(__file__).parents[2] / "docs"
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def shown(capsys, *argv):
    assert main(argv) == 0
    return capsys.readouterr().out


def test_the_map_names_every_command_with_what_it_reads_and_writes(capsys):
    text = shown(capsys, "--help")
    assert text == shown(capsys) == shown(capsys, "help") == shown(capsys, "-h")
    for name, about in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about.summary)}\n +", text, re.MULTILINE)
        assert about.flow in text
    pipeline = re.findall(r"^  (\w[\w-]*)  ", text, re.MULTILINE)
    assert pipeline[-len(COMMANDS) :][:6] == [
        "sft-data",
        "sft",
        "rollout",
        "score",
        "distill",
        "eval",
    ]


def test_what_a_command_reads_another_one_writes(capsys):
    written = {
        folder for about in COMMANDS.values() for folder in about.flow.split(" -> ")[1].split()
    }
    for name in ("sft", "rollout", "score", "distill", "eval"):
        reads = COMMANDS[name].flow.split(" -> ")[0]
        made_elsewhere = {"base/", "teacher/"}
        for folder in re.findall(r"[a-z]+/", reads):
            assert folder in written | made_elsewhere, (name, folder)


def test_the_recipe_of_the_help_is_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "local_models", lambda name: name)
    _, printed = shown(capsys, "run", "--help").split("A recipe:\n")
    (tmp_path / "recipe.yaml").write_text(printed)  # indented, as a reader copies it
    recipe = load_yaml(tmp_path / "recipe.yaml")
    assert list(recipe["stages"]) == list(run.STAGES)
    configs = run.stage_configs(recipe, "recipe.yaml")
    assert configs["distill"].holdout == 0.02 and configs["sft"].learning_rate == 8e-5
    for key in ("out", "teacher", "student", *run.SHARED):
        assert re.search(rf"\b{key}\b", printed), key
    assert f"```yaml\n{RECIPE}```" in (DOCS / "pipeline.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capsys):
    text = shown(capsys, name, "--help")
    assert all(len(line) <= 80 for line in text.splitlines())
    config = COMMANDS[name].config_class()
    groups = re.findall(r"^([A-Z][\w ,-]*):$", text, re.MULTILINE)
    used = {item.metadata["group"] for item in fields(config)}
    last = ["General", "Examples", *["A recipe"] * (name == "run")]
    assert groups == [*(group for group in GROUPS if group in used), *last]
    flags = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags)) and not any("_" in flag for flag in flags)
    for item in fields(config):
        assert f"--{item.name.replace('_', '-')}" in flags or item.default is True
    assert "None" not in text
    examples = text.partition("\nA recipe:\n")[0]
    assert examples.rstrip().endswith(COMMANDS[name].examples[-1].split(" --")[-1])


def test_required_flags_come_first_and_have_no_default(capsys):
    text = shown(capsys, "distill", "--help")
    assert text.startswith("Usage: lopd distill --student TEXT --cache TEXT --out TEXT [FLAGS]\n")
    required = text[text.index("Required:") : text.index("Model and data:")]
    assert re.findall(r"^  (--\w+)", required, re.MULTILINE) == ["--student", "--cache", "--out"]
    assert "default" not in required


def test_flags_that_turn_off_say_what_that_does(capsys):
    text = shown(capsys, "distill", "--help")
    assert re.search(r"--no-verify +Train without checking the hashes of the cache first\.\n", text)
    assert "  --verify" not in text


def test_help_names_other_settings_as_flags(capsys):
    text = " ".join(shown(capsys, "distill", "--help").split())
    assert "Adapter output is scaled by --lora-alpha / --lora-rank." in text
    assert "[default: cosine_with_min_lr]" not in text and "cosine_with_min_lr," in text


LIGHT = """
import json, sys, time
begin = len(sys.modules)
from lopd.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = {"torch", "transformers", "vllm", "accelerate", "numpy", "tqdm", "safetensors", "rich"}
print(json.dumps([code, len(sys.modules) - begin, sorted(heavy & set(sys.modules))]))
"""


@pytest.mark.parametrize(
    ("argv", "code", "completing"),
    [
        (["--help"], 0, None),
        (["--version"], 0, None),
        (["distil"], 2, None),
        (["completion", "zsh"], 0, None),
        *(([name, "--help"], 0, None) for name in COMMANDS),
        *(([name, "--nonsense"], 2, None) for name in COMMANDS),
        (["distill", "--student", "s"], 2, None),
        (["distill", "--student", "s", "--cache", "c", "--out", "o", "--beta", "0.3"], 2, None),
        (["eval", "--device", "gpu", "--model", "m", "--prompts", "p", "--out", "o"], 2, None),
        (["run", "absent.yaml", "--config", "absent.yaml"], 2, None),
        ([], 0, "lopd distill --lear"),
        ([], 0, "lopd distill --objective rev"),
    ],
)
def test_help_completion_and_errors_import_nothing_heavy(argv, code, completing):
    """Counted in modules, since seconds depend on the machine: torch alone has over 1000."""
    env = {}
    if completing:
        env = {"_LOPD_COMPLETE": "zsh_complete", "COMP_WORDS": completing, "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *argv], capture_output=True, text=True, env={**ENV, **env}
    )
    found, count, heavy = json.loads(done.stdout.splitlines()[-1])
    assert (found, heavy) == (code, []), done.stderr
    assert count < 250
