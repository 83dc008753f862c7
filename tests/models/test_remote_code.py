"""Python code in a model folder runs only where `--trust-remote-code` allows it."""

import importlib
import inspect
import io
import json
import shutil
import sys

import pytest
from helpers_stages import COMMON, one_line, rollout_argv, write_prompts

from lopd.cli import main
from lopd.cli.commands import COMMANDS
from lopd.errors import ModelError
from lopd.models.load import context_of, load_model, load_tokenizer
from lopd.provenance import read_manifest
from lopd.provenance.folder import read_vocab
from lopd.provenance.remote_code import is_code_trusted, trusting_code

SETTING = "trust_remote_code"
CODE = """
from pathlib import Path
from transformers import Qwen3Config, Qwen3ForCausalLM, PreTrainedTokenizerFast

with Path({ran!r}).open("a") as file:
    file.write(__name__ + chr(10))


class Config(Qwen3Config):
    model_type = "of_its_own"


class Model(Qwen3ForCausalLM):
    config_class = Config


class Words(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def folder(tmp_path, student_folder, monkeypatch):
    """A model whose classes are in its folder, and a terminal that answers yes."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    folder = tmp_path / "model"
    shutil.copytree(student_folder, folder)
    (folder / "modeling.py").write_text(CODE.format(ran=str(tmp_path / "ran")))
    classes = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit(folder / "config.json", model_type="of_its_own", auto_map=classes)
    return folder


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def with_tokenizer_code(folder):
    tokenizer = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["modeling.Words"] * 2}}
    edit(folder / "tokenizer_config.json", **tokenizer)


@pytest.mark.parametrize(
    "load", [context_of, load_tokenizer, lambda path: load_model(path, dtype="float32")]
)
def test_no_loader_runs_code_or_asks(folder, tmp_path, load):
    with_tokenizer_code(folder)
    with pytest.raises(ModelError, match="auto_map.*not run.*--trust-remote-code"):
        load(folder)
    assert not (tmp_path / "ran").exists() and sys.stdin.tell() == 0


def test_a_vocabulary_is_read_without_code(folder, tmp_path):
    with_tokenizer_code(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="--trust-remote-code"):
        read_vocab(folder)
    assert not (tmp_path / "ran").exists()


def test_code_that_transformers_has_itself_is_not_run_from_the_folder(folder, tmp_path):
    edit(folder / "config.json", model_type="qwen3")
    assert type(load_model(folder, dtype="float32", device="cpu")).__name__ == "Qwen3ForCausalLM"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["rollout", "plan", "sft"])
def test_commands_refuse_code_and_say_how_to_allow_it(folder, tmp_path, capsys, command):
    prompts, out = write_prompts(tmp_path / "p.jsonl"), str(tmp_path / "out")
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "the cat", "completion": "sat"}\n')
    argv = {
        "rollout": rollout_argv(folder, prompts, out),
        "plan": ["plan", "--model", str(folder), "--gpu-memory", "24GiB"],
        "sft": ["sft", "--model", str(folder), "--data", str(data), "--out", out, *COMMON],
    }[command]
    assert main(argv) == 2
    assert "pass --trust-remote-code" in one_line(capsys)
    assert not (tmp_path / "ran").exists()


def test_allowed_code_runs_and_is_recorded(folder, tmp_path, capsys):
    argv = rollout_argv(folder, write_prompts(tmp_path / "p.jsonl"), tmp_path / "rollouts")
    assert main([*argv, "--trust-remote-code"]) == 0
    assert (tmp_path / "ran").exists() and not is_code_trusted()
    manifest = read_manifest(tmp_path / "rollouts")
    assert manifest.config["trust_remote_code"] is True
    assert set(manifest.model.behaviour["code"]) == {"modeling.py"}
    (tmp_path / "rollouts" / "shard-00001.json").unlink()
    (folder / "modeling.py").write_text((folder / "modeling.py").read_text() + "# edited")
    assert main([*argv, "--trust-remote-code"]) == 2
    assert "model.behaviour.code.modeling.py was" in one_line(capsys)


def test_permission_ends_with_its_block():
    with pytest.raises(KeyError), trusting_code(True):
        raise KeyError
    assert not is_code_trusted()


def test_every_stage_with_the_setting_obeys_it():
    found = [name for name, command in COMMANDS.items() if hasattr(command.config_class(), SETTING)]
    assert {"rollout", "report", "plan"} <= set(found) and "inspect" not in found
    for name in found:
        if name != "run":  # it calls the stages
            stage = importlib.import_module(f"lopd.stages.{COMMANDS[name].module}")
            assert inspect.unwrap(stage.main) is not stage.main, name
