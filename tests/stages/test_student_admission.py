"""A student that training would refuse is refused before its answers are sampled."""

import json
import shutil

from conftest import train_bpe
from helpers_stages import rollout_argv, write_prompts

from benchmarks.families import byte_tokenizer
from benchmarks.tiny_families import tiny_model
from lopd.cli import main


def test_a_router_whose_loss_cannot_be_trained_is_refused_at_the_rollout(tmp_path, capsys):
    student = tmp_path / "student"
    tiny_model("granitemoe").save_pretrained(student)
    byte_tokenizer().save_pretrained(student)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    assert main(rollout_argv(student, prompts, tmp_path / "out")) == 2
    assert "returned no router logits" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shard-*.safetensors"))


def test_a_student_that_cannot_be_saved_again_is_refused_at_the_rollout(
    student_folder, tmp_path, capsys
):
    student = shutil.copytree(student_folder, tmp_path / "student")
    file = student / "generation_config.json"
    saved = json.loads(file.read_text())
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    file.write_text(json.dumps({**saved, "temperature": 0.6}))
    assert main(rollout_argv(student, prompts, tmp_path / "out")) == 2
    assert "set do_sample to true in its generation_config.json" in capsys.readouterr().err
    file.write_text(json.dumps({**saved, "temperature": 0.6, "do_sample": True}))
    assert main(rollout_argv(student, prompts, tmp_path / "sampled")) == 0


def test_a_config_that_names_two_vocabularies_is_refused_by_the_smaller(tmp_path, capsys):
    student = tmp_path / "student"
    tiny_model("gemma3").save_pretrained(student)
    train_bpe().save_pretrained(student)  # has 300 tokens, the model 96
    file = student / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 10**6}))
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    assert main(rollout_argv(student, prompts, tmp_path / "out")) == 2
    assert "the vocabulary of the model; use the tokenizer that" in capsys.readouterr().err
