"""Settings about prompts, in the stages that read them: what is recorded, and what is resumed."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TEMPLATE, save_qwen3
from helpers_training import make_rollouts

from lopd.cli import main
from lopd.data import rendering
from lopd.provenance import build_manifest, describe_model, lineage_of, read_manifest
from lopd.store import RolloutStore, RolloutWriter

DATED = "{{ strftime_now('%Y') }}" + TEMPLATE
COMMON = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    return save_qwen3(tmp_path_factory.mktemp("dated"), seed=4, chat_template=DATED)


def set_today(monkeypatch, year):
    class Fixed(datetime.date):
        @classmethod
        def today(cls):
            return cls(year, 1, 2)

    monkeypatch.setattr(rendering, "date", Fixed)


def roll_out(student, prompts, out, *flags):
    command = ("rollout", "--student", str(student), "--prompts", str(prompts), "--out", str(out))
    return main([*command, "--max-new-tokens", "4", "--shard-size", "1", *COMMON, *flags])


def year_of(tokenizer, sequence):
    return tokenizer.decode(sequence.tokens[: sequence.prompt_length])[:4]


def test_a_folder_has_one_date_also_when_it_is_continued(dated, write_jsonl, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    prompts, out = write_jsonl([{"prompt": "the"}, {"prompt": "a cat"}]), tmp_path / "out"
    set_today(monkeypatch, 2031)
    assert roll_out(dated, prompts, out) == 0
    for name in ("shard-00001.safetensors", "shard-00001.json"):
        for file in out.glob(f"{name.split('.')[0]}*"):
            file.unlink()
    set_today(monkeypatch, 2032)
    assert roll_out(dated, prompts, out) == 0
    store, tokenizer = RolloutStore.open(out), AutoTokenizer.from_pretrained(dated)
    assert [year_of(tokenizer, store[i]) for i in range(2)] == ["2031", "2031"]
    assert read_manifest(out).inputs["prompts"]["reading"] == {"date": "2031-01-02"}


def test_another_reading_of_the_prompts_is_another_recipe(dated, write_jsonl, tmp_path, capsys):
    prompts, out = write_jsonl([{"prompt": "the", "q": "a cat"}]), tmp_path / "out"
    assert roll_out(dated, prompts, out, "--prompt-date", "2031-01-02") == 0
    for flags in (("--prompt-date", "2031-01-03"), ("--columns", "prompt=q")):
        assert roll_out(dated, prompts, out, *flags) == 2
        assert "holds another recipe" in capsys.readouterr().err


def test_sft_pins_the_date_of_its_demonstrations(dated, write_jsonl, tmp_path, monkeypatch):
    data, out = write_jsonl([{"prompt": "the", "completion": "cat"}] * 2), tmp_path / "out"
    command = ("sft", "--model", str(dated), "--data", str(data), "--out", str(out), *COMMON)
    set_today(monkeypatch, 2031)
    assert main([*command, "--max-steps", "1", "--batch-size", "2"]) == 0
    assert json.loads((out / "recipe.json").read_text())["prompt_date_written"] == "2031-01-02"
    assert read_manifest(out).inputs["demonstrations"]["reading"] == {"date": "2031-01-02"}
    (out / "manifest.json").unlink()  # as if it had been killed before it finished
    set_today(monkeypatch, 2032)
    assert main([*command, "--max-steps", "1", "--batch-size", "2"]) == 0
    assert json.loads((out / "recipe.json").read_text())["prompt_date_written"] == "2031-01-02"


def test_eval_of_gsm8k_from_parquet(tmp_path, capsys):
    model = save_qwen3(tmp_path / "model", seed=2, chat_template=TEMPLATE)
    records = {"question": ["the cat?", "the dog?"], "answer": ["so\n#### 7", "so\n#### 1,200"]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(records), tmp_path / "data/test-00000-of-00001.parquet")
    command = ("eval", "--model", str(model), "--prompts", str(tmp_path / "data"), *COMMON)
    sampling = ("--num-samples", "40", "--max-new-tokens", "32", "--batch-size", "80")
    assert main([*command, *sampling, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "read as GSM8K" in printed.err and "(first: '1,200'" in printed.err
    results = json.loads((tmp_path / "out/results.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "out/answers.jsonl").open()]
    nothing = [answer for answer in answers if answer["answer"] is None]
    assert results["no_answer"] == sum(a["sample"] is not None for a in nothing) / 80
    complete = sum(answer["finish_reason"] == "stop" for answer in answers)
    found = sum(answer["finish_reason"] == "stop" for answer in nothing)
    assert found and f"nothing to grade in {found} of {complete} complete" in printed.err


def test_sampled_ids_of_unused_rows_are_named_and_left_out_on_request(tmp_path, capsys):
    teacher = save_qwen3(tmp_path / "teacher", seed=1, vocab_size=320)
    student = save_qwen3(tmp_path / "student", seed=2)  # 309 rows, for 306 tokens
    manifest = build_manifest(
        "sft_data",
        stage="test",
        config={},
        model=describe_model(teacher, dtype="float32", engine="transformers"),
        sampling={"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 9, "seed": 0},
        lineage=lineage_of(teacher),
        plan={"shards": [6]},
    )
    sequences = make_rollouts(6, vocab=300)
    sequences[2].tokens[-2] = 315
    with RolloutWriter.create(tmp_path / "data", manifest) as writer:
        writer.write(0, sequences)
        writer.finish()
    command = ("sft", "--model", str(student), "--data", str(tmp_path / "data"), *COMMON)
    command = (*command, "--max-steps", "1", "--batch-size", "2", "--out", str(tmp_path / "out"))
    assert main(command) == 2
    refusal = capsys.readouterr().err
    assert "has id 315; expected ids in [0, 309)" in refusal and "unused row" in refusal
    assert "--skip-bad-records leaves such records out" in refusal
    assert main([*command, "--skip-bad-records"]) == 0
    assert "left out 1 of 6 records" in capsys.readouterr().err
    assert read_manifest(tmp_path / "out").raw["training"]["sequences"] == 5
