"""The tails `unbiased` and `generalized` in training: gradients, logs, and the caches they need."""

import json

import pytest
from helpers_artefacts import SAMPLING, write_cache, write_pipeline, write_sequences
from helpers_training import near_rollouts, tiny_model

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError
from lopd.provenance import MANIFEST_NAME
from lopd.stages import distill
from lopd.training.batch import Collator
from lopd.training.step import step
from lopd_kernels import reference

FORMS = {
    "unbiased": Objective("reverse_kl", tail="unbiased"),
    "capped": Objective("reverse_kl", tail="unbiased", importance_cap=0.9),
    "generalized": Objective("reverse_kl", tail="generalized"),
    "generalized forward": Objective("forward_kl", tail="generalized"),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_step_equals_the_dense_definition(name):
    model, objective = tiny_model(spread=3.0), FORMS[name]
    batch = Collator()(near_rollouts(model=model))
    n = float(len(batch["labels"]))
    loss, stats = step(model, batch, objective, n)
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    sample = {}
    if objective.tail == "unbiased":
        sample = {
            "sampled_ids": batch["labels"],
            "sampled_logprobs": batch["teacher_logprobs"],
            "rollout_logprobs": batch["rollout_logprobs"],
            "importance_cap": objective.importance_cap,
        }
    expected = reference.sparse_divergence(
        logits[batch["loss_index"]], batch["topk_ids"], batch["topk_logprobs"],
        tail_logprobs=batch["tail_logprobs"], divergence=objective.name, tail=objective.tail,
        **sample,
    )  # fmt: skip
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for key, parameter in model.named_parameters():
        error = (found[key] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, key
    if objective.tail != "unbiased":
        assert "full_reverse_kl" not in stats
        return
    assert stats["full_reverse_kl"].item() == pytest.approx(loss.item(), rel=1e-5)
    _, bucket = step(model, batch, Objective("reverse_kl"), n)
    assert stats["reverse_kl"].item() == pytest.approx(bucket["reverse_kl"].item(), rel=1e-5)
    listed = (batch["topk_ids"] == batch["labels"][:, None]).any(1)
    share = 1.0 - listed.float().mean().item()
    assert 0.0 < stats["share_corrected"].item() == pytest.approx(share)
    assert ("share_capped" in stats) == (name == "capped")


def test_held_out_sequences_are_evaluated_by_the_bucket():
    assert FORMS["capped"].held_out == Objective("reverse_kl")
    assert FORMS["generalized"].held_out == FORMS["generalized"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "forward_kl", "tail": "unbiased"}, "tail: unbiased is a form of reverse_kl"),
        ({"name": "policy_gradient", "tail": "generalized"}, "tail: policy_gradient has none"),
        ({"name": "reverse_kl", "importance_cap": 2.0}, "sequence and tail unbiased do"),
    ],
)
def test_contradicting_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**changes)


def test_a_batch_without_rollout_logprobs_is_refused():
    items = near_rollouts(2)
    items[0].rollout.rollout_logprobs[:] = float("nan")
    with pytest.raises(DataError, match="rollout log-probs are not all known.*--tail bucket"):
        step(tiny_model(), Collator()(items), FORMS["unbiased"], 1.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def config(pipeline, out, **changes):
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    settings = {"max_steps": 2, "batch_size": 4, "device": "cpu", "save_every": 0, "log_every": 1}
    return distill.DistillConfig(**{**paths, "out": str(out), **settings, **changes})


@pytest.mark.parametrize("tail", ["unbiased", "generalized"])
def test_distill_trains_and_logs(pipeline, tmp_path, tail):
    changes = {"importance_cap": 5.0} if tail == "unbiased" else {}
    out = distill.main(config(pipeline, tmp_path / "out", tail=tail, **changes))
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    assert manifest["objective"]["tail"] == tail
    entry = json.loads((out / "train_log.jsonl").read_text().splitlines()[0])
    assert ("full_reverse_kl" in entry) == (tail == "unbiased")
    if tail == "unbiased":  # most sampled tokens of this random teacher are outside its lists
        assert entry["share_corrected"] > 0.5 and 0.0 <= entry["share_capped"] <= 1.0
        assert entry["full_reverse_kl"] != entry["reverse_kl"]


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("top_p", "temperature 1 and top_p 0.9; unbiased needs temperature 1.*top_p 1; use --tail"),
        ("temperature", "sampled at temperature 1 and top_p 1; unbiased needs temperature 0.7"),
        ("greedy", "its rollouts are greedy"),
        ("unknown", "its rollout log-probs are unknown.*leave --tail out"),
        ("unrecorded", "settings that it does not record"),
    ],
)
def test_other_caches_are_refused_before_a_model_is_built(
    pipeline, tmp_path, monkeypatch, why, message
):
    import transformers

    def explode(*args, **kwargs):
        raise AssertionError("a model was built")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)
    sampling = {
        "top_p": {**SAMPLING, "top_p": 0.9},
        "greedy": {**SAMPLING, "temperature": 0.0},
        "unrecorded": None,
    }.get(why, SAMPLING)
    monkeypatch.setattr("helpers_artefacts.SAMPLING", sampling)
    rollouts = write_sequences(tmp_path / "rollouts", pipeline / "student")
    cache = write_cache(
        tmp_path / "cache", pipeline / "teacher", rollouts,
        temperature=0.7 if why == "temperature" else 1.0, has_logprobs=why != "unknown",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=rf"^tail: .*{message}"):
        distill.main(config(pipeline, tmp_path / "out", cache=str(cache), tail="unbiased"))
    assert not (tmp_path / "out").exists()
