"""The special tokens that begin and end an answer in a chat template."""

import json

import pytest
from conftest import TEMPLATE, save_qwen3, train_bpe
from helpers_stages import rollout_argv, write_prompts

from lopd.cli import main
from lopd.data.turns import end_of_turn, start_of_answer, turn_warnings
from lopd.provenance import read_manifest

PAD, EOS, USER, ASSISTANT = range(4)  # ids of `train_bpe`
CHATML = (
    "{% for m in messages %}<|user|>{{ m.role }}\n{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "template, end, start",
    [
        (None, None, []),
        (TEMPLATE, EOS, [ASSISTANT]),
        (CHATML, PAD, [USER]),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None, []),
        ("{{ raise_exception('no') }}", None, []),
        ("a fixed text", None, []),
    ],
)
def test_the_tokens_are_found_where_the_template_writes_them(template, end, start):
    tokenizer = train_bpe(template)
    assert end_of_turn(tokenizer) == end
    assert start_of_answer(tokenizer) == start


def test_what_is_odd_is_said():
    assert turn_warnings(train_bpe(TEMPLATE), [EOS]) == []
    assert turn_warnings(train_bpe(None), [EOS]) == []
    (runs_on,) = turn_warnings(train_bpe(CHATML), [EOS])
    assert "ends a turn with id 0 ('<pad>')" in runs_on and "only with 1 '<eos>'" in runs_on
    (begins,) = turn_warnings(train_bpe(CHATML), [PAD, USER])
    assert "id 2 ('<|user|>') ends an answer" in begins


def test_a_rollout_says_and_records_how_turns_end(tmp_path, capsys):
    student = save_qwen3(tmp_path / "student", seed=2, chat_template=CHATML)
    argv = rollout_argv(student, write_prompts(tmp_path / "p.jsonl"), tmp_path / "rollouts")
    assert main(argv) == 0
    assert f"{student}: the chat template ends a turn with id 0" in capsys.readouterr().err
    assert read_manifest(tmp_path / "rollouts").raw["end_of_turn"] == PAD
    assert main(["inspect", "--path", str(tmp_path / "rollouts")]) == 0
    assert "chat template ends a turn with  id 0" in capsys.readouterr().out
    settings = json.loads((student / "generation_config.json").read_text())
    settings["eos_token_id"] = [PAD]
    (student / "generation_config.json").write_text(json.dumps(settings))
    argv = rollout_argv(student, tmp_path / "p.jsonl", tmp_path / "again")
    assert main(argv) == 0
    assert "ends a turn" not in capsys.readouterr().err
