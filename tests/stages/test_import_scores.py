"""`lopd import`: caches from dumps of other tools, declared gaps, and refused dumps."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_import import (
    PROMPTS,
    distill,
    lists_of,
    rescore,
    run,
    topk_record,
    write,
)

from lopd.cli import main
from lopd.data.external_scores import read_dump
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, DataError
from lopd.models.load import load_tokenizer
from lopd.provenance import read_manifest
from lopd.store import RolloutStore, TeacherCache


def lightning_record(text, answer, scores):
    metadata = {
        "is_lightning_opd": True,
        "response_tokens": answer,
        "loss_mask": [1] * len(answer),
        "response": "text that is not the truth",
        "teacher_log_probs": [float(x) for x in scores.teacher_logprobs],
    }
    return {"prompt": text, "label": "0", "metadata": metadata}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", ["dict", "vllm", "pairs", "structs", "arrays", "prompt"])
def test_every_form_of_a_dump_gives_the_same_cache(
    student, teacher_folder, dumped, tmp_path, capsys, form, suffix
):
    if suffix == "parquet" and form in ("dict", "vllm", "pairs", "prompt"):
        form_values = [topk_record(*item, "pairs") for item in dumped]
        maps = [[[(int(i), p) for i, p in row] for row in r["logprobs"]] for r in form_values]
        kind = pa.list_(pa.map_(pa.int64(), pa.float64()))
        columns = {
            name: [record[name] for record in form_values]
            for name in ("prompt_token_ids", "response_token_ids")
        }
        source = tmp_path / "dump.parquet"
        pq.write_table(pa.table({**columns, "logprobs": pa.array(maps, kind)}), source)
    else:
        records = [topk_record(*item, form) for item in dumped]
        source = write(tmp_path / f"dump.{suffix}", records)
    again = [run(source, "topk", student, teacher_folder, tmp_path / "cache") for _ in range(2)]
    assert again == [0, 0]
    assert capsys.readouterr().err.count("cache: finished already, nothing to do") == 1
    cache = TeacherCache.open(tmp_path / "cache", support="list")
    for found, (prompt, answer, scores) in zip(cache, dumped, strict=True):
        assert found.rollout.tokens.tolist() == prompt + answer
        assert found.rollout.prompt_length == len(prompt)
        assert np.isnan(found.rollout.rollout_logprobs).all()
        np.testing.assert_allclose(found.teacher_logprobs, scores.teacher_logprobs, rtol=1e-6)
        for t, row in enumerate(lists_of(answer, scores)):
            listed = found.topk_ids[t][found.topk_ids[t] >= 0]
            assert sorted(listed.tolist()) == sorted(row)
            outside = 1 - sum(np.exp(list(row.values())))
            assert np.exp(found.tail_logprobs[t]) == pytest.approx(outside, abs=2e-6)
    assert [item.rollout.finish_reason for item in cache] == ["stop", "length", "length"]


def test_an_imported_cache_trains_and_says_what_it_does_not_know(
    student, teacher_folder, dumped, tmp_path, capsys
):
    source = write(tmp_path / "dump.jsonl", [topk_record(*item) for item in dumped])
    cache = tmp_path / "cache"
    assert run(source, "topk", student, teacher_folder, cache, "--shard-size", "2") == 0
    manifest = read_manifest(cache).raw
    assert manifest["stage"] == "import" and manifest["declared"] is True
    assert manifest["model"]["declared"] and manifest["inputs"]["rollouts"]["model"]["declared"]
    assert manifest["scoring"] == {
        "tail": "derived",
        "entropy": "derived",
        "rollout_logprobs": "absent",
        "support": {"ids": "as imported", "list_of": "teacher", "extra_ids": 0},
    }
    assert manifest["plan"]["shards"] == [2, 1]
    assert distill(student, cache, tmp_path / "kl") == 0
    assert distill(student, cache, tmp_path / "pg", "--objective", "policy_gradient") == 0
    log = (tmp_path / "pg" / "train_log.jsonl").read_text()
    assert "advantage" in log and "log_ratio_to_rollout" not in log
    capsys.readouterr()
    assert main(["inspect", "--path", str(cache), "--verify"]) == 0
    printed, warning = capsys.readouterr()
    assert "on trust" in printed
    # A dump has the sampled token in each list because it was sampled, which says nothing.
    assert "teacher_in_lists" in printed and "sampled_in_lists" not in printed
    assert "of the teacher's probability; a loss over" in warning and "dump longer" in warning
    assert "tail derived, entropy derived, rollout_logprobs absent" in printed


def test_rollout_logprobs_and_teacher_logprobs_are_imported(
    student, teacher_folder, dumped, tmp_path
):
    records = []
    for prompt, answer, scores in dumped:
        record = topk_record(prompt, answer, scores, "arrays")
        record["topk_ids"] = scores.topk_ids.tolist()
        record["topk_logprobs"] = scores.topk_logprobs.tolist()
        record["teacher_logprobs"] = scores.teacher_logprobs.tolist()
        record["rollout_logprobs"] = [-0.5 - t / 8 for t in range(len(answer))]
        record |= {"id": "same", "finish_reason": "stop", "loss_mask": [0] + [1] * len(answer[1:])}
        records.append(record)
    source = write(tmp_path / "dump.jsonl", records)
    cache = tmp_path / "cache"
    assert run(source, "topk", student, teacher_folder, cache, "--codec", "compact") == 0
    assert read_manifest(cache).scoring.rollout_logprobs == "computed"
    items = list(TeacherCache.open(cache))
    assert [(i.rollout.prompt_id, i.rollout.sample) for i in items] == [
        ("same", n) for n in (0, 1, 2)
    ]
    for item in items:
        stored = item.rollout.rollout_logprobs.tolist()
        assert stored == [-0.5 - t / 8 for t in range(len(stored))]
    assert not items[0].rollout.loss_mask[items[0].rollout.prompt_length]


def test_the_papers_parquet_serves_the_sampled_token(
    student, teacher_folder, dumped, tmp_path, capsys
):
    records = [
        lightning_record(text, answer, scores)
        for text, (_, answer, scores) in zip(PROMPTS, dumped, strict=True)
    ]
    source = write(tmp_path / "official.parquet", records)
    cache = tmp_path / "cache"
    assert run(source, "lightning-opd", student, teacher_folder, cache) == 0
    for found, (prompt, answer, scores) in zip(TeacherCache.open(cache), dumped, strict=True):
        assert found.rollout.tokens.tolist() == prompt + answer
        np.testing.assert_allclose(found.teacher_logprobs, scores.teacher_logprobs, rtol=1e-6)
        assert found.topk_ids[:, 0].tolist() == answer
        np.testing.assert_allclose(
            np.exp(found.tail_logprobs), 1 - np.exp(found.teacher_logprobs), atol=1e-6
        )
    assert distill(student, cache, tmp_path / "out", "--objective", "policy_gradient") == 0
    capsys.readouterr()
    assert distill(student, cache, tmp_path / "no", "--support", "list") == 2
    error = capsys.readouterr().err
    assert "has no lists" in error and "found objective reverse_kl with support list" in error


def test_the_papers_parquet_is_rescored_by_its_sampled_tokens(
    student, teacher_folder, dumped, tmp_path, capsys
):
    records = [
        lightning_record(text, answer, scores)
        for text, (_, answer, scores) in zip(PROMPTS, dumped, strict=True)
    ]
    cache = tmp_path / "cache"
    source = write(tmp_path / "official.parquet", records)
    assert run(source, "lightning-opd", student, teacher_folder, cache) == 0
    assert rescore(student, teacher_folder, cache) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    noise, signal = (float(rows[name].split()[0]) for name in ("teacher", "student"))
    assert 0 <= noise < 1e-6 < 0.001 < signal


def test_raw_lists_of_nearly_all_mass_keep_their_tails(student, teacher_folder, tmp_path):
    lists = [{"9": float(np.log(0.9993)), "11": float(np.log(1e-4))}] * 3
    record = {"prompt_token_ids": [5], "response_token_ids": [9, 11, 9], "logprobs": lists}
    source = write(tmp_path / "dump.jsonl", [record])
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 0
    tail = TeacherCache.open(tmp_path / "cache")[0].tail_logprobs
    np.testing.assert_allclose(np.exp(tail), 6e-4, rtol=1e-4)


def test_a_token_outside_a_list_of_all_mass_has_a_tail(student, teacher_folder, tmp_path):
    rows = [{"9": 0.0}, {"9": float(np.log(0.75)), "11": float(np.log(0.2))}]
    record = {"prompt_token_ids": [5], "response_token_ids": [7, 8], "logprobs": rows}
    record["teacher_logprobs"] = [float(np.log(1e-5)), float(np.log(0.01))]
    source = write(tmp_path / "dump.jsonl", [record])
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 0
    (item,) = TeacherCache.open(tmp_path / "cache", support="list")
    np.testing.assert_allclose(np.exp(item.tail_logprobs), [1e-5, 0.05], rtol=1e-4)


def test_a_list_of_the_whole_vocabulary_has_no_tail(student, teacher_folder, dumped, tmp_path):
    prompt, answer, _ = dumped[0]
    teacher = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    sequence = np.array(prompt + answer, np.int32)
    (full,) = teacher.score([sequence], [len(prompt)], teacher.vocab_size)
    source = write(tmp_path / "dump.jsonl", [topk_record(prompt, answer, full)])
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 0
    (item,) = TeacherCache.open(tmp_path / "cache")
    assert np.isneginf(item.tail_logprobs).all()
    np.testing.assert_allclose(item.teacher_entropy, full.teacher_entropy, rtol=1e-4)


def test_every_end_of_sequence_id_of_the_student_stops(student, teacher_folder, dumped, tmp_path):
    other = tmp_path / "student"
    shutil.copytree(student, other)
    generation = json.loads((other / "generation_config.json").read_text())
    last = dumped[1][1][-1]
    generation["eos_token_id"] = [load_tokenizer(student).eos_token_id, last]
    (other / "generation_config.json").write_text(json.dumps(generation))
    source = write(tmp_path / "dump.jsonl", [topk_record(*item) for item in dumped])
    assert run(source, "topk", other, teacher_folder, tmp_path / "cache") == 0
    reasons = [item.rollout.finish_reason for item in TeacherCache.open(tmp_path / "cache")]
    assert reasons == ["stop", "stop", "length"]


def test_names_without_a_digest_need_overrides(student, teacher_folder, dumped, tmp_path, capsys):
    source = write(tmp_path / "dump.jsonl", [topk_record(*item) for item in dumped])
    cache = tmp_path / "cache"
    assert run(source, "topk", student, "org/teacher-8B", cache) == 0
    assert read_manifest(cache).model.weights == "unidentified: org/teacher-8B"
    assert distill(student, cache, tmp_path / "out") == 2
    assert "teacher-mismatch" in capsys.readouterr().err
    flags = ["--allow-teacher-mismatch", "--allow-tokenizer-mismatch"]
    assert distill(student, cache, tmp_path / "out", *flags) == 0
    refresh = ["--refresh-every", "1", "--teacher", str(teacher_folder)]
    assert distill(student, cache, tmp_path / "live", *flags, *refresh) == 2
    assert "was scored by engine unknown; expected transformers" in capsys.readouterr().err
    capsys.readouterr()
    assert run(source, "topk", "someone", "org/teacher-8B", tmp_path / "none") == 2
    assert "to read the vocabulary from" in capsys.readouterr().err


def test_an_interrupted_import_continues(student, teacher_folder, dumped, tmp_path):
    source = write(tmp_path / "dump.jsonl", [topk_record(*item) for item in dumped])
    flags = ["--shard-size", "1"]
    for name in ("whole", "torn"):
        assert run(source, "topk", student, teacher_folder, tmp_path / name, *flags) == 0
    (tmp_path / "torn" / "shard-00001.json").unlink()
    assert run(source, "topk", student, teacher_folder, tmp_path / "torn", *flags) == 0
    digests = {TeacherCache.open(tmp_path / name).digest() for name in ("whole", "torn")}
    assert len(digests) == 1


GOOD = {
    "prompt_token_ids": [1, 2],
    "response_token_ids": [7, 8],
    "logprobs": [{"7": -0.1, "8": -3.0}, {"8": -0.2}],
    "finish_reason": "stop",
}
BAD = {
    "no prompt": ({"prompt_token_ids": None}, r"found \['finish_reason', 'logprobs'"),
    "text": ({"response_token_ids": None, "text": "a"}, "expected 'prompt_token_ids' and either"),
    "two forms": ({"topk_ids": [[7], [8]], "topk_logprobs": [[-1], [-1]]}, "and either"),
    "no response": ({"response_token_ids": [], "logprobs": []}, "0 response tokens"),
    "too few": ({"logprobs": [{"7": -0.1}]}, "1 entries of log-probs for 2 response tokens"),
    "own absent": (
        {"logprobs": [{"7": -1.0}, {"9": -1.0}]},
        r"token 1 \(id 8\) is not in its list",
    ),
    "nan": ({"logprobs": [{"7": float("nan")}, {"8": -1}]}, "token 0 .* or has no log-prob there"),
    "overfull": (
        {"logprobs": [{"7": -0.1}, {"8": -0.1, "9": -0.1}]},
        "token 1: a list of mass 1.8",
    ),
    "twice": ({"logprobs": [[[7, -1.0], [7, -2.0]], {"8": -1}]}, "token 0: an id is listed twice"),
    "words": ({"logprobs": [{"cat": -1.0}, {"8": -1}]}, "token 0: .* is not a list of log-probs"),
    "numbers": ({"logprobs": [-1.0, -2.0]}, "token 0: -1.0 is not a list of log-probs"),
    "null": ({"logprobs": [None, {"8": -1}]}, "token 0: None is not a list"),
    "mask": ({"loss_mask": [1]}, "1 entries of loss_mask for 2"),
    "mask of zeros": ({"loss_mask": [0, 0]}, "no token bears loss; drop the record"),
    "mask of words": ({"loss_mask": ["a", 1]}, "loss_mask is .*; expected 0 and 1"),
    "mask of two": ({"loss_mask": [2, 1]}, r"loss_mask is \[2, 1\]; expected 0 and 1"),
    "finish": ({"finish_reason": "abort"}, "finish_reason is 'abort'; expected stop or length"),
    "sample": ({"sample": "x"}, "sample is 'x'; expected a number"),
    "list is no list": ({"logprobs": 3}, "a field has another type"),
    "float listed": ({"logprobs": [[[7.5, -1.0]], {"8": -1}]}, "token 0: .* is not a list"),
    "float ids": ({"response_token_ids": [7.5, 8]}, "expected a list of integers"),
}


@pytest.mark.parametrize("change, message", BAD.values(), ids=BAD)
def test_a_bad_record_is_named(tmp_path, change, message):
    record = {key: value for key, value in {**GOOD, **change}.items() if value is not None}
    source = write(tmp_path / "dump.jsonl", [GOOD, record])
    with pytest.raises(DataError, match=f"dump.jsonl:2: .*{message}"):
        list(read_dump(source, "topk", None))


def test_fields_that_a_dump_lacks_need_the_students_tokenizer(tmp_path):
    record = {key: value for key, value in GOOD.items() if key != "finish_reason"}
    with pytest.raises(ConfigError, match="dump.jsonl:1: no finish_reason"):
        list(read_dump(write(tmp_path / "dump.jsonl", [record]), "topk", None))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher_log_probs": None}, "metadata has no 'teacher_log_probs'"),
        ({"is_lightning_opd": False}, "metadata has is_lightning_opd not true"),
        ({"teacher_log_probs": [-1.0]}, "1 entries of the teacher's log-probs for 4"),
    ],
)
def test_another_parquet_is_refused(student, dumped, tmp_path, change, message):
    record = lightning_record(PROMPTS[0], *dumped[0][1:])
    record["metadata"] |= change
    source = write(tmp_path / "official.parquet", [record])
    with pytest.raises(DataError, match=f"official.parquet: row 1: {message}"):
        list(read_dump(source, "lightning-opd", load_tokenizer(student)))
    plain = write(tmp_path / "plain.parquet", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(DataError, match=r"row 1: found columns \['messages'\]"):
        list(read_dump(plain, "lightning-opd", None))


def test_a_file_that_lacks_some_rollout_logprobs_or_all_records_is_refused(
    student, teacher_folder, tmp_path, capsys
):
    some = [{**GOOD, "rollout_logprobs": [-1.0, -1.0]}, GOOD]
    for records, message in (
        (some, "1 of 2 records have rollout_logprobs"),
        ([], "no usable records"),
    ):
        source = write(tmp_path / "dump.jsonl", records)
        assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_an_id_beyond_the_vocabulary_is_refused(student, teacher_folder, tmp_path, capsys):
    far = {**GOOD, "logprobs": [{"7": -0.1, "9999": -4.0}, {"8": -0.2}]}
    source = write(tmp_path / "dump.jsonl", [far])
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 2
    assert "id 9999; expected ids in" in capsys.readouterr().err


def test_rollouts_are_not_mistaken_for_a_store(student, teacher_folder, dumped, tmp_path):
    source = write(tmp_path / "dump.jsonl", [topk_record(*item) for item in dumped])
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 0
    with pytest.raises(ConfigError, match="holds 'cache', expected 'rollouts'"):
        RolloutStore.open(tmp_path / "cache")


def test_lists_of_the_students_ids_are_imported_as_such(
    student, teacher_folder, dumped, tmp_path, capsys
):
    """The sampled token is more probable to the teacher than ids that the student listed."""
    records = []
    for prompt, answer, scores in dumped:
        full = scores.topk_ids, scores.topk_logprobs, answer
        lists = [
            {str(i): float(lp) for i, lp in zip(*row, strict=True) if i != token}
            for *row, token in zip(*full, strict=True)
        ]
        record = {"prompt_token_ids": prompt, "response_token_ids": answer, "logprobs": lists}
        records.append(record | {"teacher_logprobs": scores.teacher_logprobs.tolist()})
    lists = records[0]["logprobs"]
    token = min(lists[0], key=lists[0].get)
    lists[0] = {token: lists[0][token] - 20}
    source, cache = write(tmp_path / "dump.jsonl", records), tmp_path / "cache"
    assert run(source, "topk", student, teacher_folder, cache) == 2
    assert "the smallest of its list, which lacks it" in capsys.readouterr().err
    assert run(source, "topk", student, teacher_folder, cache, "--support", "student") == 0
    manifest = read_manifest(cache, kind="cache")
    assert manifest.scoring.list_of == "student" and manifest.teacher_k == 0
    first = next(iter(TeacherCache.open(cache, support="list")))
    assert first.topk_ids[0][first.topk_ids[0] >= 0].tolist() == [int(token)]
    assert distill(student, cache, tmp_path / "kl") == 0
    assert distill(student, cache, tmp_path / "fkl", "--objective", "forward_kl") == 2
