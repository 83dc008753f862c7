"""A run killed at any point between two steps and its end is, continued, the uninterrupted one."""

import itertools
import json
import pkgutil

import pytest

from lopd.provenance import manifest_digest, read_manifest
from lopd.provenance.folder_receipt import RECEIPT_NAME
from lopd.stages import distill
from lopd.training.checkpoints import checkpoints

pytestmark = pytest.mark.thorough

# 9 sequences are trained on: an epoch is 3 steps, and the run ends within its third epoch. The
# held-out KL rises again after step 3, and is best there.
VALUES = [5.0, 4.0, 1.0, 3.0, 2.0, 2.5, 1.5]
SETTINGS = {
    **{"batch_size": 3, "learning_rate": 1e-2, "device": "cpu", "max_steps": 7, "log_every": 2},
    **{"holdout": 3, "eval_steps": 1, "keep_best": True, "save_every": 2, "save_total_limit": 1},
}


class Killed(BaseException):
    """Not an Exception, so that nothing handles it: what is on the disk stays as it is."""


@pytest.fixture(scope="module", autouse=True)
def fixed_kl():
    def fake(model, holdout, collate, batch_size, step_number, **processes):
        return {"holdout_kl": VALUES[step_number - 1]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lopd.training.trainer.holdout_kl", fake)
        yield


def run(pipeline, out):
    paths = {name: str(pipeline / name) for name in ("student", "cache")}
    return distill.main(distill.DistillConfig(**paths, out=str(out), **SETTINGS))


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    return run(pipeline, tmp_path_factory.mktemp("whole") / "out")


# Where the process dies, before or after which calls of a function.
POINTS = {
    "lopd.training.trainer.LopdTrainer.evaluate": ("before", 1, 4, 7),
    "lopd.training.trainer.LopdTrainer._determine_best_metric": ("after", 1, 3, 4),
    "lopd.training.trainer.finish": ("before", 1, 3, 4, 6),
    "lopd.training.trainer.rotate": ("before", 1, 3, 4, 6),
    "lopd.training.result.result_model": ("before", 1),
    "lopd.training.result.export": ("after", 1),
    "lopd.training.result.seal": ("before", 1),
    "lopd.stages.distill.finish_checkpoint": ("before", 1),
}
CASES = [(name, when, call) for name, (when, *calls) in POINTS.items() for call in calls]


@pytest.mark.parametrize(("name", "when", "call"), CASES)
def test_a_killed_run_ends_with_the_same_best_checkpoint(
    pipeline, whole, tmp_path, monkeypatch, name, when, call
):
    owner, attribute = name.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    function, calls = getattr(owner, attribute), itertools.count(1)

    def dying(*args, **kwargs):
        number = next(calls)
        if number == call and when == "before":
            raise Killed
        result = function(*args, **kwargs)
        if number == call:
            raise Killed
        return result

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, attribute, dying)
        run(pipeline, tmp_path / "out")
    out = run(pipeline, tmp_path / "out")
    assert read_manifest(whole).raw["holdout"]["result_step"] == 3
    receipts = [json.loads((folder / RECEIPT_NAME).read_text()) for folder in (whole, out)]
    assert receipts[0] == receipts[1] and "model.safetensors" in receipts[0]["files"]
    assert manifest_digest(read_manifest(out)) == manifest_digest(read_manifest(whole))
    for report in ("holdout", "stale", "training"):
        assert read_manifest(out).raw[report] == read_manifest(whole).raw[report]
    names = [{f.name for f in checkpoints(folder)} for folder in (whole, out)]
    assert {"checkpoint-3", "checkpoint-7"} == names[0] == names[1]
