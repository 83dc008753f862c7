"""Whose ids the lists hold: the teacher's, the student's or both, from scoring to training."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import save_qwen3
from helpers_stages import COMMON, make_rollouts, one_line, score_argv

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.evaluation.agreement import measure
from lopd.provenance import read_manifest
from lopd.store import RolloutStore, TeacherCache
from lopd.store.size import size_bounds, work_left

pytestmark = pytest.mark.thorough  # pipelines from prompts to trained students


K = 6


@pytest.fixture(scope="module")
def rollouts(student, tmp_path_factory):
    return make_rollouts(student, tmp_path_factory.mktemp("rollouts"))


def dense_logprobs(folder, rollout):
    """[R, V] fp64, from one forward of the model on the sequence."""
    engine = TransformersEngine.load(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        logits = engine.model(torch.from_numpy(rollout.tokens).long()[None]).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()[rollout.prompt_length - 1 : -1]


def prefix(logprobs, top_p):  # [V] -> ids
    ids = np.argsort(-logprobs, kind="stable")[:K]
    mass = np.exp(logprobs[ids])
    return ids[np.cumsum(mass) - mass < top_p]


def score(teacher, rollouts, out, *flags):
    assert main(score_argv(teacher, rollouts, out, *flags)) == 0
    return TeacherCache.open(out, support="list")


@pytest.mark.parametrize(
    ("list_of", "top_p", "codec"),
    [
        ("student", 1.0, "exact"),
        ("student", 1.0, "packed"),
        ("student", 1.0, "compact"),
        ("student", 0.5, "exact"),
        ("union", 1.0, "exact"),
        ("union", 0.5, "compact"),
    ],
)
def test_lists_hold_the_ids_of_their_models_and_the_teachers_exact_log_probs(
    teacher_folder, student, rollouts, tmp_path, list_of, top_p, codec
):
    """The student is found by the manifest of the rollouts."""
    flags = ["--support", list_of, "--top-p", str(top_p), "--codec", codec]
    cache = score(teacher_folder, rollouts, tmp_path / "cache", *flags)
    rounding = {"exact": 2e-6, "packed": 2**-11, "compact": 2**-5}[codec]  # of a log-prob
    fell = 0
    for item in [cache[i] for i in range(0, len(cache), 5)]:
        q, p = (dense_logprobs(folder, item.rollout) for folder in (teacher_folder, student))
        for row, (ids, logprobs) in enumerate(zip(item.topk_ids, item.topk_logprobs, strict=True)):
            listed = ids[ids >= 0]
            expected = set(prefix(p[row], top_p).tolist())
            if list_of == "union":
                expected |= set(prefix(q[row], top_p).tolist())
            assert set(listed.tolist()) == expected and len(listed) == len(expected)
            np.testing.assert_allclose(  # rounded, and shifted by the mean of such errors
                logprobs[: len(listed)], q[row, listed], rtol=2 * rounding, atol=2e-5
            )
            tail = np.log1p(-np.exp(q[row, listed]).sum())
            assert item.tail_logprobs[row] == pytest.approx(tail, rel=2 * rounding, abs=2e-5)
            fell += bool((np.diff(logprobs[: len(listed)]) > 0).any())
    assert fell or codec == "compact" or top_p < 1  # the order is not that of the teacher


def test_the_manifest_and_inspect_say_whose_the_lists_are(
    teacher_folder, student, rollouts, tmp_path, capsys
):
    cache = score(teacher_folder, rollouts, tmp_path / "cache", "--support", "student")
    support = cache.manifest.raw["scoring"]["support"]
    assert (support["list_of"], support["extra_ids"]) == ("student", 0)
    assert support["student"]["weights"] == read_manifest(rollouts).model.weights
    out, err = capsys.readouterr()
    assert "of the sampled tokens" in err and "of the teacher's probability" not in err
    assert "kl_to_teacher" in out and "teacher_in_lists" in out
    assert main(["inspect", "--path", str(tmp_path / "cache"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (rows["lists"], rows["lists of"]) == ("student's top k", "student")
    assert main(["verify", "--path", str(tmp_path / "cache")]) == 0


def test_an_unfinished_cache_is_not_continued_with_other_lists(
    teacher_folder, student, rollouts, tmp_path, capsys
):
    cache = score(teacher_folder, rollouts, tmp_path / "cache", "--support", "student").path
    (cache / "shard-00001.json").unlink()
    assert main(score_argv(teacher_folder, rollouts, cache)) == 2
    assert "scoring.support" in one_line(capsys)
    assert main(score_argv(teacher_folder, rollouts, cache, "--support", "student")) == 0


def test_an_older_cache_holds_the_teachers_lists_and_is_continued(
    teacher_folder, rollouts, tmp_path
):
    cache = score(teacher_folder, rollouts, tmp_path / "cache").path
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest["scoring"]["support"]["list_of"], manifest["sha256"]
    for file in cache.glob("shard-*"):
        file.unlink()
    (cache / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(cache).scoring.list_of == "teacher"
    assert main(score_argv(teacher_folder, rollouts, cache)) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--objective", "forward_kl"], "forward_kl weighs ids with the teacher's probability"),
        (["--objective", "jsd"], "jsd weighs ids with the teacher's probability"),
        (["--tail", "renormalize"], "renormalize ignores the teacher's probability outside"),
    ],
)
def test_losses_that_need_the_teachers_ids_refuse_the_students(
    teacher_folder, student, rollouts, tmp_path, capsys, flags, message
):
    cache = score(teacher_folder, rollouts, tmp_path / "cache", "--support", "student").path
    argv = ["distill", "--student", student, "--cache", cache, "--out", tmp_path / "out"]
    argv = [*map(str, argv), *COMMON, "--max-steps", "1", "--batch-size", "4", *flags]
    assert main(argv) == 2
    error = one_line(capsys)
    assert message in error and "--support union" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("list_of", "flags"),
    [
        ("student", ["--tail", "bucket"]),
        ("student", ["--tail", "unbiased"]),
        ("union", ["--objective", "forward_kl"]),
    ],
)
def test_losses_train_on_lists_that_suit_them(
    teacher_folder, student, rollouts, tmp_path, list_of, flags
):
    cache = score(teacher_folder, rollouts, tmp_path / "cache", "--support", list_of).path
    argv = ["distill", "--student", student, "--cache", cache, "--out", tmp_path / "out"]
    argv = [*map(str, argv), *COMMON, "--max-steps", "1", "--batch-size", "4", *flags]
    assert main(argv) == 0


def test_refreshed_rollouts_are_scored_on_lists_of_the_same_models(
    teacher_folder, student, rollouts, tmp_path
):
    cache = score(teacher_folder, rollouts, tmp_path / "cache", "--support", "student").path
    argv = ["distill", "--student", student, "--cache", cache, "--out", tmp_path / "out"]
    argv += [*COMMON, "--max-steps", "2", "--batch-size", "4", "--save-every", "1"]
    argv += ["--teacher", teacher_folder, "--refresh-every", "2"]
    assert main(list(map(str, argv))) == 0
    (window,) = (tmp_path / "out" / "refresh").glob("step-*")
    item = TeacherCache.open(window, support="list")[0]
    p, q = (dense_logprobs(folder, item.rollout) for folder in (student, teacher_folder))
    assert set(item.topk_ids[0].tolist()) == set(prefix(p[0], 0.999).tolist())
    np.testing.assert_allclose(item.topk_logprobs[0], q[0, item.topk_ids[0]], atol=2e-5)


@pytest.mark.parametrize("named", [False, True])
def test_the_student_must_be_the_one_that_rolled_out(
    teacher_folder, student_folder, tmp_path, capsys, named
):
    folder = tmp_path / "student"
    shutil.copytree(student_folder, folder)
    rollouts = make_rollouts(folder, tmp_path)
    shutil.rmtree(folder)
    flags = ["--support", "student"]
    if named:
        other = save_qwen3(tmp_path / "other", seed=9)
        flags += ["--student", str(other)]
    capsys.readouterr()
    assert main(score_argv(teacher_folder, rollouts, tmp_path / "cache", *flags)) == 2
    error = one_line(capsys)
    assert ("name the student that made them" in error) and not (tmp_path / "cache").exists()
    assert ("have weights" in error or "has weights" in error) == named
    argv = score_argv(teacher_folder, rollouts, tmp_path / "cache", "--support", "student")
    assert main([*argv, "--student", str(student_folder)]) == 0


def test_overlap_and_sizes_are_those_of_lists_of_both(teacher_folder, student, rollouts, tmp_path):
    flags = ["--support", "union", "--top-p", "1"]
    cache = score(teacher_folder, rollouts, tmp_path / "cache", *flags)
    shared = []
    for item in cache:
        q, p = (dense_logprobs(folder, item.rollout) for folder in (teacher_folder, student))
        shared += [len({*prefix(a, 1)} & {*prefix(b, 1)}) / K for a, b in zip(q, p, strict=True)]
    assert 0 < np.mean(shared) < 1
    assert measure(cache).student_top_listed.value == pytest.approx(np.mean(shared), abs=1e-9)
    store = RolloutStore.open(rollouts)
    work = work_left(store, store.manifest.shards)
    low, high = (size.of(work) for size in size_bounds(cache.manifest, list(store)))
    assert low < cache.summary()["bytes"] <= high < 1.6 * low
