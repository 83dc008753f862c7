"""`lopd eval`: its files, its KL to a teacher, and what it refuses."""

import errno
import json
import shutil

import pytest

from lopd.config.evaluate import EvalConfig
from lopd.config.inspect import InspectConfig
from lopd.errors import ConfigError, DataError, ProvenanceError, ShardError
from lopd.stages import evaluate, inspect
from lopd.stages.evaluate import main
from lopd.store.locks import FolderLock


def settings(**changes):
    defaults = {
        "model": "m",
        "prompts": "p",
        "out": "o",
        "max_new_tokens": 8,
        "dtype": "float32",
        "device": "cpu",
    }
    return EvalConfig(**(defaults | changes))


def test_eval_writes_results_answers_and_a_manifest(
    teacher_folder, student_folder, prompt_file, tmp_path, capsys
):
    changes = {"model": str(student_folder), "teacher": str(teacher_folder)}
    out = main(settings(prompts=str(prompt_file), out=str(tmp_path / "e"), **changes))
    results = json.loads((out / "results.json").read_text())
    assert {"greedy", "avg@4", "pass@1", "pass@4", "kl"} <= set(results)
    assert sum(row["count"] for row in results["by_length"]) == 7 * 4
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 7 * 5 and {answer["sample"] for answer in answers} == {None, 0, 1, 2, 3}
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["kind"] == "evaluation"
    assert "KL to the teacher" in capsys.readouterr().out


def test_inspect_shows_the_results(student_folder, prompt_file, tmp_path, capsys):
    out = str(tmp_path / "eval")
    main(settings(model=str(student_folder), prompts=str(prompt_file), out=out, max_new_tokens=4))
    printed = capsys.readouterr().out.splitlines()
    inspect.main(InspectConfig(path=out))
    rows = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {" ".join(line.split()) for line in printed} < rows


def test_prompts_without_answers_are_refused(student_folder, write_jsonl):
    path = write_jsonl([{"prompt": "a", "answer": "1"}, {"id": "p2", "prompt": "b"}])
    with pytest.raises(DataError, match=":2: has no 'answer'"):
        main(settings(model=str(student_folder), prompts=str(path)))


@pytest.mark.parametrize("pattern", ["(", "a", "(a)(b)"])
def test_answer_regex_needs_exactly_one_group(pattern):
    with pytest.raises(ConfigError, match="answer_regex"):
        settings(answer_regex=pattern)


def test_kl_is_on_samples_at_temperature_1_and_top_p_1(
    teacher_folder, student_folder, prompt_file, tmp_path
):
    def kl(**changes):
        name = f"e{len(list(tmp_path.iterdir()))}"
        models = {"model": str(student_folder), "teacher": str(teacher_folder)}
        paths = {"prompts": str(prompt_file), "out": str(tmp_path / name)}
        out = main(settings(num_samples=1, **models, **paths, **changes))
        return json.loads((out / "results.json").read_text())["kl"]

    assert kl(temperature=0.3) == kl(top_p=0.5) == kl()


def test_teacher_with_another_tokenizer_is_refused(student_folder, prompt_file, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(student_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = dict(
        zip(vocab, [*list(vocab.values())[:4], *list(vocab.values())[:3:-1]], strict=True)
    )
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    changes = {"model": str(student_folder), "teacher": str(other), "prompts": str(prompt_file)}
    with pytest.raises(ProvenanceError, match=r"id \d+ is .* to it and .* to the model"):
        main(settings(out=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["file", "file/under", "model", "finished"])
def test_folder_in_use_is_not_written_to(student_folder, prompt_file, tmp_path, name):
    (tmp_path / "file").write_text("x")
    shutil.copytree(student_folder, tmp_path / "model")
    inputs = {"model": str(student_folder), "prompts": str(prompt_file), "num_samples": 1}
    main(settings(out=str(tmp_path / "finished"), **inputs))
    changed = {**inputs, "num_samples": 2}
    with pytest.raises(ConfigError, match="another --out|a new or empty folder"):
        main(settings(out=str(tmp_path / name), **changed))
    assert not (tmp_path / "model/manifest.json").exists()


@pytest.mark.parametrize("changes", [{"temperature": float("nan")}, {"kl_k": 0}, {"top_p": 0.0}])
def test_setting_out_of_range_is_named(changes):
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}: found"):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "vibes"}, "judge: found 'vibes'; expected one of exact, math"),
        ({"kl_k": 8}, "kl_k: found 8, which has no effect: no KL is measured; set teacher"),
        ({"judge": "math", "answer_regex": "(a)"}, "answer_regex: --judge math does not use it"),
    ],
)
def test_settings_that_do_not_fit_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_a_second_evaluation_is_refused_and_a_finished_one_is_printed(
    student_folder, prompt_file, tmp_path, monkeypatch, capsys
):
    config = settings(
        model=str(student_folder), prompts=str(prompt_file), out=str(tmp_path / "out")
    )
    (tmp_path / "out").mkdir()
    lock = FolderLock(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(ShardError, match="is writing there"):
        patch.setattr(evaluate, "measure_accuracy", None)
        main(config)
    lock.release()
    # Killed between its files, and within the write of one.
    write = evaluate.write_atomic

    def killed(path, data):
        if path.name == "results.json":
            (path.parent / f".{path.name}.1.tmp").write_bytes(data[:7])
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "write_atomic", killed)
        main(config)
    out = main(config)
    expected = {".lock", "answers.jsonl", "results.json", "receipt.json", "manifest.json"}
    assert {item.name for item in out.iterdir()} == expected
    printed = capsys.readouterr().out
    monkeypatch.setattr(evaluate, "measure_accuracy", None)
    assert main(config) == out
    again = capsys.readouterr()
    assert again.out == printed != ""
    assert f"{out}: finished already, nothing to do\n" in again.err
    (out / "results.json").write_text("{")
    with pytest.raises(DataError, match="results.json: found 1 bytes, the receipt says"):
        main(config)
    (out / "receipt.json").unlink()  # as in evaluations of earlier versions
    with pytest.raises(DataError, match="results.json: torn or altered"):
        main(config)


def test_a_full_disk_is_named_with_the_folder(student_folder, prompt_file, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    monkeypatch.setattr(evaluate, "write_atomic", full)
    with pytest.raises(ShardError, match=f"{out}: not written .No space left on device.; fix this"):
        main(settings(model=str(student_folder), prompts=str(prompt_file), out=str(out)))


@pytest.mark.parametrize("judge", ["exact", "math"])
def test_answers_that_cannot_be_graded_are_left_out_on_request(
    student_folder, write_jsonl, tmp_path, capsys, judge
):
    bad = "" if judge == "math" else "5 # 6"
    records = [{"prompt": "the cat", "answer": answer} for answer in ("1", bad, "2")]
    path = write_jsonl([{**record, "id": str(i)} for i, record in enumerate(records)])
    changes = {"model": str(student_folder), "prompts": str(path), "judge": judge}
    with pytest.raises(DataError, match="prompt '1': .*--skip-bad-records leaves such records out"):
        main(settings(**changes, out=str(tmp_path / "e")))
    out = main(settings(**changes, out=str(tmp_path / "e"), skip_bad_records=True))
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {answer["id"] for answer in answers} == {"0", "2"}
    assert "left out 1 of 3 records\n  prompt '1'" in capsys.readouterr().err
    path = write_jsonl([records[1]])
    with pytest.raises(DataError, match="no prompt is left; prompt '"):
        main(settings(**changes | {"prompts": str(path)}, skip_bad_records=True))
