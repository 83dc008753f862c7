"""Stages on a local Ray of two workers: the same shards as from one process."""

import inspect
import os
import re
from pathlib import Path

import pytest
from helpers_artefacts import write_cache, write_pipeline

from lopd import RolloutConfig, ScoreConfig, VerifyConfig, rollout, score, verify
from lopd.errors import ConfigError, DataError, MissingFileError, ProvenanceError, ShardError

pytest.importorskip("ray", reason="part of the extra `ray`")

import ray

from lopd.integrations.ray import _check_complete, run_stage

ONE = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 << 20,
        configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


@pytest.mark.thorough
def test_two_workers_write_what_one_process_writes(
    cluster, tmp_path, teacher_folder, student_folder, write_jsonl, caplog, monkeypatch
):
    prompts = write_jsonl([{"prompt": f"the cat sat on {i}"} for i in range(6)])
    sampling = {
        "student": str(student_folder), "prompts": str(prompts), "max_new_tokens": 6,
        "shard_size": 2, **ONE,
    }  # fmt: skip
    rollout(RolloutConfig(out=str(tmp_path / "rollouts"), **sampling))
    cpus = {"workers": 2, "num_gpus": 0}
    done = run_stage(RolloutConfig(out=str(tmp_path / "ray-rollouts"), **sampling), **cpus)
    assert done == tmp_path / "ray-rollouts"
    assert len(shards(done)) == 6 and shards(done) == shards(tmp_path / "rollouts")

    scoring = {"teacher": str(teacher_folder), "rollouts": str(tmp_path / "rollouts"), "k": 4}
    score(ScoreConfig(out=str(tmp_path / "cache"), **scoring, **ONE))
    cache = tmp_path / "ray-cache"
    config = ScoreConfig(out=str(cache), **scoring, **ONE)
    run_stage(config, **cpus)
    assert shards(cache) == shards(tmp_path / "cache")
    for path in cache.glob("shard-00001.*"):
        path.unlink()
    run_stage(config, **cpus)  # continues
    assert shards(cache) == shards(tmp_path / "cache")
    verify(VerifyConfig(path=str(cache)))

    assert "num_gpus" not in caplog.text
    monkeypatch.setattr(ray, "remote", lambda work: pytest.fail("would wait"))
    with pytest.raises(pytest.fail.Exception, match="would wait"):
        run_stage(config, workers=2)
    assert "found 1 for a worker, but no node of the cluster has more than 0" in caplog.text
    monkeypatch.undo()

    with pytest.raises(MissingFileError, match="absent"):
        run_stage(ScoreConfig(teacher="absent", rollouts="absent", out=str(tmp_path / "x")), **cpus)
    with pytest.raises(ProvenanceError, match="student: .* the rollouts were made by"):
        other = ScoreConfig(
            out=str(tmp_path / "y"), student=str(teacher_folder), extra_ids=2, **scoring, **ONE
        )
        run_stage(other, **cpus)


@pytest.mark.parametrize(
    ("settings", "workers", "message"),
    [
        ({}, 0, "workers: found 0"),
        ({"worker": "0/2"}, 2, "worker: found '0/2'; leave it out"),
        ({"plan": True}, 2, "plan: found True; run 'lopd score --plan'"),
    ],
)
def test_what_ray_cannot_do_is_refused(settings, workers, message):
    with pytest.raises(ConfigError, match=message):
        run_stage(ScoreConfig(teacher="t", rollouts="r", out="o", **settings), workers=workers)
    with pytest.raises(ConfigError, match="found VerifyConfig; expected one of RolloutConfig"):
        run_stage(VerifyConfig(path="f"), workers=1)


def test_workers_that_die_matter_if_their_shards_are_missing(tmp_path):
    whole = write_pipeline(tmp_path / "whole") / "cache"
    part = write_cache(
        tmp_path / "part", tmp_path / "whole/teacher", tmp_path / "whole/rollouts", shards=(0,)
    )
    died, refused = RuntimeError("first\nnode lost"), DataError("sequence p/0: too long")
    for failures in ([], [died], [died, refused]):
        _check_complete(str(whole), failures)
    with pytest.raises(
        ShardError, match="1 workers failed .RuntimeError: node lost.; run it again"
    ):
        _check_complete(str(part), [died])
    with pytest.raises(DataError, match="sequence p/0: too long"):
        _check_complete(str(part), [died, refused])
    with pytest.raises(ShardError, match="1 of 2 shards are unfinished"):
        _check_complete(str(part), [])


def test_the_how_to_page_runs(monkeypatch):
    """Its call, with the cluster left out."""
    page = (Path(__file__).parents[2] / "docs/how-to/many-nodes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    seen = []
    monkeypatch.setattr(
        "lopd.integrations.ray.run_stage",
        lambda config, **settings: seen.append((config, inspect.signature(run_stage), settings)),
    )
    exec(compile(example, "many-nodes.md", "exec"), {})
    ((config, signature, settings),) = seen
    signature.bind(config, **settings)
    assert isinstance(config, ScoreConfig) and config.k == 64
