"""Rollouts with weights and rewards: imported, scored, inspected, and trained on, end to end."""

import json
import re

import pytest
from conftest import TEXT
from helpers_artefacts import write_cache, write_sequences

from lopd.cli import main
from lopd.errors import ConfigError
from lopd.models.load import load_tokenizer
from lopd.provenance import MANIFEST_NAME
from lopd.stages import distill
from lopd.store import RolloutStore, TeacherCache

ON_CPU = ["--dtype", "float32", "--device", "cpu"]
TRAIN = ["--max-steps", "2", "--batch-size", "4", "--save-every", "0", "--log-every", "1"]


def records(student, count=4):
    """Dumped rollouts; the second has its weights for the whole sequence, as a mask may."""
    encode, words = load_tokenizer(student).encode, TEXT.split()
    made = []
    for number in range(count):
        prompt = encode(" ".join(words[number : number + 3]), add_special_tokens=False)
        answer = encode(" ".join(words[number + 3 : number + 8]), add_special_tokens=False)
        weights = [0.5 * (t % 3) for t in range(len(answer))]
        made.append(
            {
                "id": f"p{number}",
                "prompt_token_ids": prompt,
                "response_token_ids": answer,
                "reward": float(number % 2),
                "weight": 1.0 + number,
                "token_weights": [0.0] * (len(prompt) * (number == 1)) + weights,
            }
        )
    return made


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_import(source, student, out, *flags):
    argv = ["import", "--format", "rollouts", "--source", str(source), "--student", str(student)]
    return main([*argv, "--out", str(out), *flags])


@pytest.fixture(scope="module")
def cache(student, teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted")
    source = write(folder / "r.jsonl", records(student))
    assert run_import(source, student, folder / "rollouts", "--shard-size", "3") == 0
    argv = ["--teacher", str(teacher_folder), "--rollouts", str(folder / "rollouts")]
    flags = ["--k", "4", "--codec", "compact", *ON_CPU]
    assert main(["score", *argv, "--out", str(folder / "cache"), *flags]) == 0
    return folder / "cache"


def test_they_reach_the_cache_and_are_shown(student, cache, capsys):
    for folder in (cache.parent / "rollouts", cache):
        assert main(["verify", str(folder)]) == 0
        capsys.readouterr()
        assert main(["inspect", str(folder), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["rewards"] == "known of 4, mean 0.5, 50.0% above 0"
        assert shown["sequence weights"] == "1 to 4" and shown["token weights"] == "yes"
    found = [item.rollout for item in TeacherCache.open(cache)]
    for rollout, record in zip(found, records(student), strict=True):
        assert (rollout.weight, rollout.reward) == (record["weight"], record["reward"])
        length = len(record["response_token_ids"])
        assert rollout.token_weights.tolist() == record["token_weights"][-length:]


@pytest.mark.parametrize("kind", ["none", "advantage", "entropy"])
def test_the_kinds_of_rules_train(student, cache, tmp_path, capsys, kind):
    out = tmp_path / "out"
    argv = ["distill", "--student", str(student), "--cache", str(cache), "--out", str(out)]
    flags = ["--token-weights", kind, "--holdout", "1", *TRAIN, *ON_CPU]
    assert main([*argv, *flags]) == 0
    assert "weighted as its rollouts say; effective share of tokens" in capsys.readouterr().err
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    entry = next(entry for entry in log if "loss" in entry)
    assert json.loads((out / MANIFEST_NAME).read_text())["objective"]["token_weights"] == kind
    ruled = kind not in ("none", "entropy")
    assert ("kept_share" in entry) == ("ess_weights" in entry) == ruled
    assert ("share_forward" in entry) == (kind == "entropy")
    if ruled:
        assert 0 < entry["ess_weights"] <= 1 and 0 < entry["kept_share"] <= 1.0 + 1e-6
    assert main([*argv, *flags]) == 0
    assert "finished already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "its weight is 0; expected a positive number"),
        ({"weight": "1"}, "weight is '1'; expected a finite number"),
        ({"reward": {"score": 1}}, "reward is .*; expected a finite number; leave the field out"),
        ({"token_weights": [1.0]}, "1 entries of token_weights for"),
        ({"token_weights": None, "weight": float("inf")}, "weight is inf"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_can_be_left_out(
    student, tmp_path, capsys, change, message
):
    made = records(student)
    source = write(tmp_path / "r.jsonl", [made[0], {**made[1], **change}, *made[2:]])
    assert run_import(source, student, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(rf"r\.jsonl:2: .*{message}", error), error
    assert run_import(source, student, tmp_path / "out", "--skip-bad-records") == 0
    assert len(RolloutStore.open(tmp_path / "out")) == 3


def test_a_choice_may_have_its_own_weights(student, tmp_path):
    first, second = records(student)[::2]
    choices = [
        {
            "token_ids": item["response_token_ids"],
            "reward": item["reward"] - 1,
            "token_weights": item["token_weights"],
        }
        for item in (first, second)
    ]
    shared = {"prompt_token_ids": first["prompt_token_ids"], "reward": 7, "weight": 2}
    source = write(tmp_path / "r.jsonl", [{**shared, "choices": choices}])
    assert run_import(source, student, tmp_path / "out") == 0
    found = list(RolloutStore.open(tmp_path / "out"))
    assert [(item.weight, item.reward) for item in found] == [(2.0, -1.0)] * 2
    assert found[1].token_weights.tolist() == second["token_weights"]


@pytest.mark.parametrize(
    ("why", "changes", "message"),
    [
        ("no reward", {"token_weights": "advantage"}, "has none for 12 of 12; write 'reward'"),
        ("no entropy", {"token_weights": "entropy"}, "lacks; score with --engine transformers"),
    ],
)
def test_caches_that_lack_what_a_rule_reads_are_refused_before_a_model_is_built(
    pipeline, tmp_path, monkeypatch, why, changes, message
):
    import transformers

    def explode(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)
    cache = pipeline / "cache"
    if why == "no entropy":
        rollouts = write_sequences(tmp_path / "rollouts", pipeline / "student")
        cache = write_cache(tmp_path / "cache", pipeline / "teacher", rollouts, has_entropy=False)
    paths = {"student": str(pipeline / "student"), "cache": str(cache)}
    config = distill.DistillConfig(
        **paths, out=str(tmp_path / "out"), max_steps=2, device="cpu", **changes
    )
    with pytest.raises(ConfigError, match=message):
        distill.main(config)
    assert not (tmp_path / "out").exists()


def test_answers_with_weights_are_not_refreshed(student, cache, teacher_folder, tmp_path, capsys):
    argv = ["distill", "--student", str(student), "--cache", str(cache), "--teacher"]
    flags = [str(teacher_folder), "--refresh-every", "1", "--out", str(tmp_path / "out"), *ON_CPU]
    assert main([*argv, *flags]) == 2
    assert "have weights, and refreshed ones would have none" in capsys.readouterr().err
    assert main([*argv, *flags, "--token-weights", "advantage"]) == 2
    assert "--refresh-every replaces the answers" in capsys.readouterr().err
