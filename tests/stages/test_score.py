"""Scoring and sampling as stages: workers, extra ids, plans, engines that fail."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers_stages import (
    COMMON,
    fork_workers,
    make_rollouts,
    one_line,
    rollout_argv,
    score_argv,
    shard_bytes,
    write_prompts,
)

from lopd.cli import main
from lopd.config.score import ScoreConfig
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, ModelError
from lopd.evaluation.agreement import measure
from lopd.store import RolloutStore, TeacherCache


@pytest.fixture(scope="module")
def rollouts(student_folder, tmp_path_factory):
    return make_rollouts(student_folder, tmp_path_factory.mktemp("rollouts"))


@pytest.fixture(scope="module")
def cache(teacher_folder, rollouts, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "cache"
    assert main(score_argv(teacher_folder, rollouts, out)) == 0
    return out


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_score_to_the_same_bytes(teacher_folder, rollouts, cache, tmp_path, count):
    argv = score_argv(teacher_folder, rollouts, tmp_path / "out")
    assert fork_workers(count, argv) == [0] * count
    assert shard_bytes(tmp_path / "out") == shard_bytes(cache)
    digests = [TeacherCache.open(folder).digest() for folder in (cache, tmp_path / "out")]
    assert digests[0] == digests[1]


@pytest.mark.thorough
def test_processes_that_are_killed_are_replaced_by_another_number(
    teacher_folder, rollouts, cache, tmp_path
):
    argv = score_argv(teacher_folder, rollouts, tmp_path / "out")
    assert fork_workers(2, argv, doomed=2) == [-9, -9]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("shard-*")}
    assert 2 <= len(before) <= 4
    assert fork_workers(3, argv) == [0, 0, 0]
    assert shard_bytes(tmp_path / "out") == shard_bytes(cache)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


@pytest.mark.thorough
def test_processes_sample_to_the_same_bytes(student_folder, rollouts, tmp_path):
    argv = rollout_argv(student_folder, rollouts.parent / "prompts.jsonl", tmp_path / "out")
    assert fork_workers(2, argv, doomed=1)[1] == 0
    assert shard_bytes(tmp_path / "out") == shard_bytes(rollouts)


@pytest.mark.slow
def test_torchrun_scores_to_the_same_bytes(teacher_folder, rollouts, cache, tmp_path):
    argv = score_argv(teacher_folder, rollouts, tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [*command, "-m", "lopd.cli", *argv],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )
    assert shard_bytes(tmp_path / "out") == shard_bytes(cache)


def test_one_worker_of_two_writes_all_shards_if_the_other_is_absent(
    teacher_folder, rollouts, cache, tmp_path
):
    argv = score_argv(teacher_folder, rollouts, tmp_path / "out", "--worker", "1/2")
    assert main(argv) == 0
    assert shard_bytes(tmp_path / "out") == shard_bytes(cache)


def test_the_manifest_says_where_tail_entropy_and_list_come_from(cache):
    manifest = TeacherCache.open(cache).manifest
    scoring = dict(manifest.raw["scoring"])
    support = {"ids": "teacher's top k", "list_of": "teacher", "extra_ids": 0}
    assert scoring.pop("support") == support
    assert scoring == {"tail": "computed", "entropy": "computed", "rollout_logprobs": "computed"}


def test_the_end_says_how_near_student_and_teacher_are(teacher_folder, rollouts, cache, capsys):
    assert main(score_argv(teacher_folder, rollouts, cache)) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    found = measure(TeacherCache.open(cache, support="list"))
    mean, error = rows["kl_to_teacher"].split(", standard error ")
    assert float(mean) == pytest.approx(found.log_ratio.value, rel=1e-3)
    assert float(error) == pytest.approx(found.log_ratio.error, rel=1e-3)
    assert rows["sequences_compared"] == "20" and "frozen rollouts  " in out
    assert "of the teacher's probability and " in err  # 6 ids of a random teacher


def test_a_first_attempt_that_wrote_no_shard_may_be_repeated_otherwise(
    teacher_folder, rollouts, cache, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"

    def refuses(*args, **kwargs):
        raise ModelError("it does not load")

    with monkeypatch.context() as patch:
        patch.setattr("lopd.stages.score.load_engine", refuses)
        assert main(score_argv(teacher_folder, rollouts, out, "--dtype", "float16")) == 2
    assert "it does not load" in one_line(capsys) and (out / "manifest.json").exists()
    assert main(score_argv(teacher_folder, rollouts, out)) == 0
    assert shard_bytes(out) == shard_bytes(cache)


def test_a_plan_for_a_folder_of_another_recipe_is_refused(teacher_folder, rollouts, cache, capsys):
    assert main(score_argv(teacher_folder, rollouts, cache, "--k", "5", "--plan")) == 2
    assert "holds another recipe (k was 6, is 5)" in one_line(capsys)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (["--codec", "gzip"], "codec: found 'gzip'; expected one of exact, packed, compact"),
        (["--tokens-per-batch", "0"], "tokens_per_batch: found 0; expected at least 1"),
    ],
)
def test_settings_are_refused_before_a_folder_is_made(
    teacher_folder, rollouts, tmp_path, capsys, flag, message
):
    assert main(score_argv(teacher_folder, rollouts, tmp_path / "out", *flag)) == 2
    assert message in one_line(capsys) and not (tmp_path / "out").exists()


def test_the_students_top_ids_join_the_lists(teacher_folder, student_folder, rollouts, tmp_path):
    flags = ["--student", str(student_folder), "--extra-ids", "3", "--top-p", "0.5"]
    assert main(score_argv(teacher_folder, rollouts, tmp_path / "out", *flags)) == 0
    items = TeacherCache.open(tmp_path / "out", support="list")
    support = items.manifest.raw["scoring"]["support"]
    assert support["extra_ids"] == 3
    assert support["student"]["weights"] == items.manifest.rollouts.model.weights
    teacher = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    student = TransformersEngine.load(student_folder, dtype="float32", device="cpu")
    sequences = [items[i] for i in range(6)]
    asked = [s.rollout.tokens for s in sequences], [s.rollout.prompt_length for s in sequences]
    everything, top = teacher.score(*asked, teacher.vocab_size), student.score(*asked, 3)
    for item, full, own in zip(sequences, everything, top, strict=True):
        dense = np.empty((len(full.teacher_logprobs), teacher.vocab_size))
        np.put_along_axis(dense, full.topk_ids.astype(int), full.topk_logprobs, axis=1)
        for row in range(len(dense)):
            ids = item.topk_ids[row][item.topk_ids[row] >= 0]
            assert set(own.topk_ids[row]) <= set(ids) and full.topk_ids[row, 0] in ids
            np.testing.assert_allclose(
                item.topk_logprobs[row][: len(ids)], dense[row, ids], atol=2e-5
            )
            outside = np.setdiff1d(np.arange(teacher.vocab_size), ids)
            expected = np.log(np.exp(dense[row, outside]).sum())
            assert item.tail_logprobs[row] == pytest.approx(expected, abs=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("extra", [0, 3])
def test_lists_of_different_widths_are_rescored_together(
    teacher_folder, student_folder, rollouts, tmp_path, capsys, extra
):
    """A cut at top_p leaves lists of different lengths, so every sequence has its own width."""
    flags = ["--top-p", "0.6", "--temperature", "0.5"]
    flags += ["--student", str(student_folder), "--extra-ids", str(extra)] * bool(extra)
    argv = score_argv(teacher_folder, rollouts, tmp_path / "cache", *flags)
    argv[argv.index("--k") + 1] = "16"
    assert main(argv) == 0
    cache = TeacherCache.open(tmp_path / "cache", support="list")
    assert len({item.lists.width for item in cache}) > 1
    models = ["--teacher", str(teacher_folder), "--student", str(student_folder)]
    for count in (2, 3, 7, len(cache)):
        command = ["verify", "--path", str(tmp_path / "cache"), "--rescore", str(count), *models]
        assert main([*command, "--dtype", "float32", "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert f"{count} sequences, " in printed and "100.0 % of the listed ids" in printed


def test_extra_ids_of_another_student_are_refused(teacher_folder, rollouts, tmp_path, capsys):
    flags = ["--student", str(teacher_folder), "--extra-ids", "3"]
    assert main(score_argv(teacher_folder, rollouts, tmp_path / "out", *flags)) == 2
    assert "name the student that made them" in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student": "s"}, "student: found 's', which has no effect"),
        ({"extra_ids": 3, "support": "student"}, "extra_ids: found 3, which has no effect"),
        ({"support": "both"}, "expected one of teacher, student, union"),
        ({"engine": "vllm", "temperature": 0.5}, "vllm scores at temperature 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        ScoreConfig(teacher="t", rollouts="r", out="o", **settings)


def test_a_plan_is_printed_and_nothing_is_written(teacher_folder, rollouts, tmp_path, capsys):
    argv = score_argv(teacher_folder, rollouts, tmp_path / "out", "--plan")
    assert main(argv) == 0
    assert not (tmp_path / "out").exists()
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    totals = RolloutStore.open(rollouts).summary()
    assert rows["sequences"].strip() == "20, 20 to score"
    assert rows["tokens"].strip().startswith(f"{totals['tokens']}, {totals['response_tokens']} of")
    assert rows["shards"].strip() == "4, 4 to write"
    assert {name.strip() for name in rows} >= {"bytes", "free disk", "sample", "time"}


def test_a_plan_counts_what_is_left(teacher_folder, rollouts, cache, tmp_path, capsys):
    copy = Path(shutil.copytree(cache, tmp_path / "out"))
    (copy / "shard-00003.json").unlink()
    assert main(score_argv(teacher_folder, rollouts, copy, "--plan")) == 0
    shown = capsys.readouterr().out
    assert "20, 2 to score" in shown and "4, 1 to write" in shown


@pytest.mark.parametrize("flags", [[], ["--plan"]])
def test_what_cannot_fit_is_refused_at_once(
    teacher_folder, rollouts, tmp_path, capsys, monkeypatch, flags
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("lopd.store.size.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(
        TransformersEngine, "load", lambda *a, **k: pytest.fail("a model was loaded")
    )
    assert main(score_argv(teacher_folder, rollouts, tmp_path / "out", *flags)) == 2
    message = one_line(capsys)
    assert "with the shortest lists" in message and "the disk has 1 kB free" in message
    assert not (tmp_path / "out").exists()


def test_a_sample_that_shows_too_little_room_stops_the_run_before_a_shard_is_written(
    teacher_folder, rollouts, cache, tmp_path, capsys, monkeypatch
):
    """Room for the shortest lists, not for these."""
    real = sum(len(data) for name, data in shard_bytes(cache).items())
    usage = shutil.disk_usage(tmp_path)._replace(free=int(0.8 * real))
    monkeypatch.setattr("lopd.store.size.shutil.disk_usage", lambda path: usage)
    argv = score_argv(teacher_folder, rollouts, tmp_path / "out", "--k", "100")
    assert main(argv) == 2
    assert "scored sequences" in one_line(capsys)
    assert not shard_bytes(tmp_path / "out")


def test_an_engine_that_scores_too_few_or_none_writes_nothing(
    teacher_folder, rollouts, tmp_path, capsys, monkeypatch
):
    score = TransformersEngine.score
    monkeypatch.setattr(
        TransformersEngine, "score", lambda self, *a, **k: score(self, *a, **k)[:-1]
    )
    assert main(score_argv(teacher_folder, rollouts, tmp_path / "out")) == 2
    assert "engine: transformers scored" in one_line(capsys)
    assert not shard_bytes(tmp_path / "out")


def test_scores_that_are_one_off_are_refused_at_the_door(
    teacher_folder, rollouts, tmp_path, capsys, monkeypatch
):
    score = TransformersEngine.score

    def shifted(self, *args, **settings):
        fields = ("topk_ids", "topk_logprobs", "tail_logprobs")
        return [
            replace(s, **{name: np.roll(getattr(s, name), 1, axis=0) for name in fields})
            for s in score(self, *args, **settings)
        ]

    monkeypatch.setattr(TransformersEngine, "score", shifted)
    assert main(score_argv(teacher_folder, rollouts, tmp_path / "out")) == 2
    assert "logprobs of response token" in one_line(capsys)
    assert not shard_bytes(tmp_path / "out")


def test_an_engine_that_gives_too_few_answers_writes_nothing(
    student_folder, tmp_path, capsys, monkeypatch
):
    generate = TransformersEngine.generate

    def one_less(self, prompts, *args, **kwargs):
        answers = generate(self, prompts, *args, **kwargs)
        return answers[1:] if len(prompts) == 4 else answers  # the check before asks for two

    monkeypatch.setattr(TransformersEngine, "generate", one_less)
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    assert main(rollout_argv(student_folder, prompts, tmp_path / "out")) == 2
    assert "gave 3 answers to 4 prompts" in one_line(capsys)
    assert not shard_bytes(tmp_path / "out")


def test_a_rollout_without_a_response_is_refused(teacher_folder, rollouts):
    engine = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    item = RolloutStore.open(rollouts)[0]
    with pytest.raises(ValueError, match="expected at least one prompt token and one response"):
        engine.score([item.tokens[: item.prompt_length]], [item.prompt_length], 2)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_is_asked_for_in_one_line_where_it_is_not(teacher_folder, rollouts, tmp_path, capsys):
    argv = ["score", "--teacher", str(teacher_folder), "--rollouts", str(rollouts)]
    argv += ["--out", str(tmp_path / "out"), "--k", "6", "--engine", "vllm", *COMMON]
    assert main(argv) == 2
    assert "vllm is not installed here" in one_line(capsys)
