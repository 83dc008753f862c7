"""Several teachers: prompts routed by a field, one cache, and a gate that compares by name."""

import json
import shutil

import numpy as np
import pytest
from conftest import TEXT, save_qwen3
from helpers_stages import COMMON, fork_workers, one_line, rollout_argv, score_argv, shard_bytes

from lopd.cli import main
from lopd.evaluation.calibration import Calibration, fold_of
from lopd.provenance import fingerprint_weights, read_manifest
from lopd.store import RolloutStore, TeacherCache

pytestmark = pytest.mark.thorough  # pipelines from prompts to trained students


NAMES = ("math", "code")


def write_routed(path, count=10, field="domain", **more):
    """Prompts for the two teachers: three of `code` for one of `math`."""
    words = TEXT.split()
    records = [
        {"prompt": " ".join(words[i : i + 3]), field: NAMES[i % 4 > 0], **more}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two teachers, prompts, and a student that was fine-tuned on the answers of both."""
    root = tmp_path_factory.mktemp("several")
    for seed, name in enumerate(NAMES, 1):
        save_qwen3(root / name, seed)
    save_qwen3(root / "base", 3, num_hidden_layers=2)
    write_routed(root / "prompts.jsonl")
    assert main(answers_argv(root, root / "answers")) == 0
    argv = ["sft", "--model", root / "base", "--data", root / "answers", "--out", root / "student"]
    assert main([*map(str, argv), "--max-steps", "1", "--device", "cpu"]) == 0
    prompts = root / "prompts.jsonl"
    assert main(rollout_argv(root / "student", prompts, root / "rollouts")) == 0
    assert main(several_argv(root, root / "cache")) == 0
    return root


def answers_argv(root, out, *flags):
    argv = ["sft-data", *named(root), "--teacher-field", "domain", "--out", out]
    argv += ["--prompts", root / "prompts.jsonl", "--max-new-tokens", "6", "--shard-size", "4"]
    return [*map(str, argv), *COMMON, *flags]


def named(root, **folders):
    folders = {name: root / name for name in NAMES} | folders
    return [text for name in folders for text in ("--teacher", f"{name}={folders[name]}")]


def several_argv(root, out, *flags, **folders):
    argv = ["score", *named(root, **folders), "--teacher-field", "domain", "--out", out]
    return [*map(str, [*argv, "--rollouts", root / "rollouts", "--k", "6"]), *COMMON, *flags]


def distill_argv(root, cache, out, *flags):
    argv = ["distill", "--student", root / "student", "--cache", cache, "--out", out]
    return [*map(str, argv), "--max-steps", "2", "--log-every", "1", "--device", "cpu", *flags]


def records(store):
    return {(s.rollout.prompt_id, s.rollout.sample): s for s in store}


def test_each_teacher_scores_its_records_as_if_it_were_alone(world, tmp_path):
    cache = TeacherCache.open(world / "cache")
    cache.check_complete()
    assert len(cache) == 20
    assert cache.manifest.shard_teachers == ("code",) * 4 + ("math",) * 3
    found = records(cache)
    assert {name: sum(s.teacher_id == name for s in found.values()) for name in NAMES} == {
        "math": 6,
        "code": 14,
    }
    for name in NAMES:
        alone = tmp_path / name
        assert main(score_argv(world / name, world / "rollouts", alone)) == 0
        for key, sequence in records(TeacherCache.open(alone)).items():
            same = (found[key].teacher_logprobs == sequence.teacher_logprobs).all()
            assert same == (found[key].teacher_id == name)
            assert sequence.teacher_id is None


def test_each_teacher_answers_its_prompts(world):
    store = RolloutStore.open(world / "answers", kind="sft_data")
    assert store.manifest.shard_teachers == ("code", "code", "math")
    assert [len(store.of_teacher(name)) for name in NAMES] == [3, 7]
    lineage = read_manifest(world / "student").lineage
    weights = {name: fingerprint_weights(world / name) for name in NAMES}
    assert {name: each.weights for name, each in lineage.sft_teachers.items()} == weights
    assert lineage.sft_teacher.weights not in weights.values()


def test_the_gate_compares_teachers_by_name(world, tmp_path, capsys):
    swapped = several_argv(world, tmp_path / "c", math=world / "code", code=world / "math")
    assert main(swapped) == 0
    capsys.readouterr()
    assert main(distill_argv(world, tmp_path / "c", tmp_path / "no")) == 2
    assert "teacher-mismatch: found records of 'code' scored by" in one_line(capsys)
    assert not (tmp_path / "no").exists()
    flag = "--allow-teacher-mismatch"
    assert main(distill_argv(world, tmp_path / "c", tmp_path / "allowed", flag)) == 0
    overrides = read_manifest(tmp_path / "allowed").overrides
    assert [each.name for each in overrides] == ["teacher-mismatch"] * 2


def test_the_log_splits_by_teacher(world, tmp_path):
    out, flags = tmp_path / "result", ("--holdout", "8", "--loss-aggregation", "token_mean")
    assert main(distill_argv(world, world / "cache", out, *flags)) == 0
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    for record in log:
        if "loss" in record:
            parts = [record[key] for key in record if key.startswith("divergence/")]
            assert min(parts) <= record["reverse_kl"] <= max(parts)
    held_out = [record for record in log if "holdout_kl" in record]
    for record in held_out:
        parts = [record[f"holdout_kl/{name}"] for name in NAMES]
        assert min(parts) < record["holdout_kl"] < max(parts)
    assert len(held_out) >= 2
    argv = ["report", out, "--answers", "0", "--out", tmp_path / "report.html"]
    assert main([*map(str, argv), "--device", "cpu"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Divergence on held-out sequences of math" in page
    assert "cache, records of code scored by" in page
    argv = ["eval", "--model", out, "--cache", world / "cache", "--out", tmp_path / "eval"]
    assert main([*map(str, argv), "--device", "cpu"]) == 0
    kl = json.loads((tmp_path / "eval" / "results.json").read_text())["cache_kl"]
    counts = {"math": 48, "code": 112}
    whole = sum(count * kl["by_teacher"][name] for name, count in counts.items()) / 160
    assert whole == pytest.approx(kl["nats_per_token"], rel=1e-5)


def test_a_killed_run_continues_at_the_next_teacher(world, tmp_path, monkeypatch):
    from lopd.stages import score

    loaded = []
    load = score.load_engine

    def stop_at_math(engine, path, **options):
        if path.endswith("math"):
            raise KeyboardInterrupt
        return load(engine, path, **options)

    monkeypatch.setattr(score, "load_engine", stop_at_math)
    assert main(several_argv(world, tmp_path / "c")) == 130
    assert len(list((tmp_path / "c").glob("shard-*.json"))) == 4
    monkeypatch.setattr(
        score, "load_engine", lambda e, path, **o: loaded.append(path) or load(e, path, **o)
    )
    assert main(several_argv(world, tmp_path / "c")) == 0
    assert loaded == [str(world / "math")]
    assert shard_bytes(tmp_path / "c") == shard_bytes(world / "cache")


def test_workers_write_the_same_cache(world, tmp_path):
    codes = fork_workers(3, several_argv(world, tmp_path / "c"), doomed=1)
    assert codes == [-9, 0, 0]
    assert shard_bytes(tmp_path / "c") == shard_bytes(world / "cache")


def test_the_plan_counts_by_teacher(world, tmp_path, capsys):
    assert main(several_argv(world, tmp_path / "c", "--plan")) == 0
    printed = capsys.readouterr().out
    assert "teacher code 14 sequences in 4 shards" in " ".join(printed.split())
    assert "teacher math 6 sequences in 3 shards" in " ".join(printed.split())
    assert not (tmp_path / "c").exists()


def test_prompts_without_ids_are_found_by_their_text(world):
    assert "id" not in json.loads((world / "prompts.jsonl").read_text().splitlines()[0])
    routing = read_manifest(world / "cache").inputs["routing"]
    assert routing["field"] == "domain"


def test_rescoring_asks_the_teacher_of_each_record(world, capsys):
    argv = ["verify", "--path", world / "cache", "--rescore", "20", *named(world)]
    argv = [*map(str, [*argv, "--student", world / "student"]), *COMMON]
    assert main(argv) == 0
    share = capsys.readouterr().out.split("noise share")[1].split()[0]
    assert float(share) < 1e-6
    swapped = named(world, math=world / "code", code=world / "math")
    argv = [argument for argument in argv if "=" not in argument and argument != "--teacher"]
    assert main([*argv, *map(str, swapped)]) == 2
    assert "records of 'math' were scored by" in one_line(capsys)
    assert main([*argv, "--teacher", str(world / "math")]) == 2
    assert "expected --teacher code=PATH --teacher math=PATH" in one_line(capsys)


def test_one_template_makes_the_prompts_of_every_teacher(world, tmp_path, capsys):
    """With the chat template of each, and a part for one of them."""
    folders = {}
    for name in NAMES:
        folders[name] = shutil.copytree(world / name, tmp_path / name)
        chat = "{% for turn in messages %}{{ turn.content }}{% endfor %} " + name
        (folders[name] / "chat_template.jinja").write_text(chat)
    text = "{{ chat(messages) }}{% if domain == 'math' %} the cat{% endif %}"
    (tmp_path / "hint.jinja").write_text(text)
    flags, out = ("--teacher-template", str(tmp_path / "hint.jinja")), tmp_path / "cache"
    assert main(several_argv(world, out, *flags, **folders)) == 0
    found, plain = (records(TeacherCache.open(each)) for each in (out, world / "cache"))
    for name in NAMES:
        argv = score_argv(folders[name], world / "rollouts", tmp_path / f"{name}-alone", *flags)
        assert main(argv) == 0
        for key, sequence in records(TeacherCache.open(tmp_path / f"{name}-alone")).items():
            own, alone = found[key].teacher_logprobs, sequence.teacher_logprobs
            assert np.allclose(own, alone, atol=1e-4) == (found[key].teacher_id == name)
            assert np.abs(own - plain[key].teacher_logprobs).max() > 0.01
    argv = ["verify", "--path", out, "--rescore", "20", *named(world, **folders)]
    capsys.readouterr()
    assert main([*map(str, [*argv, "--student", world / "student"]), *COMMON]) == 0
    share = capsys.readouterr().out.split("noise share")[1].split()[0]
    assert float(share) < 1e-6


def test_a_student_may_be_one_of_its_teachers_if_it_is_told_more(world, tmp_path, capsys):
    (tmp_path / "hint.jinja").write_text("{{ prompt }} the cat")
    flags, own = ("--teacher-template", str(tmp_path / "hint.jinja")), {"code": world / "student"}
    assert main(several_argv(world, tmp_path / "cache", *flags, **own)) == 0
    assert main(distill_argv(world, tmp_path / "cache", tmp_path / "out")) == 0
    assert not read_manifest(tmp_path / "out").overrides
    assert main(several_argv(world, tmp_path / "plain", **own)) == 0
    capsys.readouterr()
    assert main(distill_argv(world, tmp_path / "plain", tmp_path / "no")) == 2
    assert "teacher-mismatch: found records of 'code' scored by" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "law"}, "prompts.jsonl:3: domain: found 'law', which names no teacher"),
        ({"domain": None}, "prompts.jsonl:3: domain: found no such field; expected the name"),
        ({"domain": ["math"]}, "prompts.jsonl:3: domain: found ['math']; expected the name"),
    ],
)
def test_a_record_without_a_teacher_is_refused(
    world, tmp_path, capsys, monkeypatch, change, message
):
    from lopd.stages import rollout, score

    for stage in (rollout, score):
        monkeypatch.setattr(stage, "load_engine", lambda *a, **k: pytest.fail("a model is built"))
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.loads(line) for line in (world / "prompts.jsonl").read_text().splitlines()]
    lines[2] |= change
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([*answers_argv(world, tmp_path / "a"), "--prompts", str(prompts)]) == 2
    assert message in one_line(capsys)
    assert main([*several_argv(world, tmp_path / "c"), "--prompts", str(prompts)]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()


def test_teachers_that_do_not_fit_the_records_are_refused(world, tmp_path, capsys):
    third = ["--teacher", f"law={world / 'math'}"]
    for argv in (answers_argv(world, tmp_path / "a"), several_argv(world, tmp_path / "c")):
        assert main([*argv, *third]) == 2
        assert "has domain 'law'; leave that teacher out" in one_line(capsys)
        assert main([*argv, "--teacher", f"math={world / 'code'}"]) == 2
        assert "the name 'math' is given twice" in one_line(capsys)
        assert main([*argv, "--teacher", str(world / "code")]) == 2
        assert "beside others; expected NAME=VALUE of each" in one_line(capsys)
        without = [text for text in argv if text not in ("--teacher-field", "domain")]
        assert main(without) == 2
        assert "set --teacher-field" in one_line(capsys)
    one = [*score_argv(world / "math", world / "rollouts", tmp_path / "c")]
    assert main([*one, "--teacher-field", "domain"]) == 2
    assert "expected NAME=PATH" in one_line(capsys)
    assert main([*one, "--prompts", "p.jsonl"]) == 2
    assert "only teacher_template and teacher_field read" in one_line(capsys)


def test_prompts_that_were_altered_or_moved_are_refused(world, tmp_path, capsys):
    prompts = world / "prompts.jsonl"
    kept = prompts.read_text()
    try:
        prompts.write_text(kept.replace("the cat", "a cat"))
        assert main(several_argv(world, tmp_path / "c")) == 2
        assert "altered since" in one_line(capsys)
        assert main([*several_argv(world, tmp_path / "c"), "--prompts", str(prompts)]) == 2
        assert "has no record of the rollouts' prompt" in one_line(capsys)
        prompts.unlink()
        assert main(several_argv(world, tmp_path / "c")) == 2
        assert "which is not there" in one_line(capsys)
    finally:
        prompts.write_text(kept)
    moved = tmp_path / "moved.jsonl"
    moved.write_text("".join(reversed(kept.splitlines(keepends=True))))
    assert main([*several_argv(world, world / "cache"), "--prompts", str(moved)]) == 0


def test_live_rollouts_need_one_teacher(world, tmp_path, capsys):
    flags = ("--refresh-every", "1", "--teacher", str(world / "math"))
    assert main(distill_argv(world, world / "cache", tmp_path / "r", *flags)) == 2
    assert "was scored by 2 teachers; expected one" in one_line(capsys)


def test_each_teacher_is_calibrated_by_its_own_records(world, tmp_path, capsys):
    swapped, out = tmp_path / "swapped", tmp_path / "calibrated"
    assert main(several_argv(world, swapped, math=world / "code", code=world / "math")) == 0
    argv = ["calibrate", "--cache", str(swapped), "--out", str(out)]
    math = {s.rollout.prompt_id for s in TeacherCache.open(swapped) if s.teacher_id == "math"}
    folds = next(n for n in range(2, 1000) if len({fold_of(prompt, n) for prompt in math}) == 1)
    assert main([*argv, "--folds", str(folds)]) == 2
    assert f"all prompts of 'math' are in one of {folds} folds" in one_line(capsys)
    assert main(argv) == 0
    assert "code: log q - log p_ref after" in capsys.readouterr().out
    old, new = TeacherCache.open(swapped, support="list"), TeacherCache.open(out)
    for name in NAMES:
        calibration = Calibration(old.manifest.vocab_size, 5, "rollout_logprobs_raw")
        chosen = [pair for pair in zip(old, new, strict=True) if pair[0].teacher_id == name]
        for before, _ in chosen:
            calibration.add(before)
        for before, after in chosen:
            assert (after.teacher_logprobs == calibration.calibrated(before)).all()
            assert after.teacher_id == name
    assert main(["verify", "--path", str(out)]) == 0
    flags = ("--objective", "policy_gradient")
    assert main(distill_argv(world, out, tmp_path / "trained", *flags)) == 0
    found = [each.found for each in read_manifest(tmp_path / "trained").overrides]
    assert len(found) == 2 and all(each.endswith(", calibrated") for each in found)


def test_inspect_shows_each_teacher(world, capsys):
    assert main(["inspect", "--path", str(world / "cache")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"model of math {world / 'math'} (" in printed
    assert "teacher math 6 sequences, 48 response tokens, kl_to_teacher" in printed
    assert main(["inspect", "--path", str(world / "student")]) == 0
    assert f"fine-tuned on code {world / 'code'} (" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", "--path", str(world / "answers")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "vocabulary matches the manifest" in printed and f"teacher code {world}" in printed


def test_a_dataset_keeps_the_names(world):
    pytest.importorskip("datasets", reason="part of the extra `datasets`")
    from lopd.integrations.datasets import from_dataset, to_dataset

    cache = TeacherCache.open(world / "cache")
    names = [item.teacher_id for item in from_dataset(to_dataset(cache))]
    assert names == [item.teacher_id for item in cache] and {*names} == {*NAMES}
