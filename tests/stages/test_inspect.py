"""`lopd inspect` against the arrays and files of a cache."""

import json

import numpy as np
import pytest
from helpers_artefacts import write_model, write_pipeline
from helpers_cache import make_manifest, write_cache, write_rollouts

from lopd.cli import main
from lopd.config.distill import DistillConfig
from lopd.stages import distill
from lopd.store import CODECS, TeacherCache


@pytest.mark.parametrize("codec", CODECS)
def test_totals_of_a_cache(tmp_path, capsys, codec):
    write_cache(tmp_path, make_manifest(codec=codec, top_p=0.8))
    assert main(["inspect", "--path", str(tmp_path)]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    parts = [float(value) for name, value in rows.items() if name.startswith("bytes/token ")]
    assert sum(parts) == pytest.approx(size / 30, rel=2e-3) and len(parts) > 15
    assert float(rows["bytes_per_response_token"]) == pytest.approx(size / 30, rel=1e-3)
    sequences = list(TeacherCache.open(tmp_path, support="list"))
    lengths = np.sort(np.concatenate([(s.topk_ids >= 0).sum(axis=1) for s in sequences]))
    assert float(rows["mean_list_length"]) == pytest.approx(lengths.mean(), rel=1e-3)
    expected = [
        f"{q:.0%} <= {lengths[int(np.ceil(q * 30)) - 1]}" for q in (0.1, 0.5, 0.9, 0.99, 1.0)
    ]
    assert rows["list lengths"] == ", ".join(expected)
    error = TeacherCache.open(tmp_path).summary()["codec_error"]
    assert rows["codec_error"] == f"{error:.3g} nat"
    assert {"mean_covered_mass", "mean_entropy"} <= rows.keys()
    assert rows["temperature"] == "1"
    columns = ("tail", "entropy", "rollout_logprobs", "teacher_logprobs")
    assert rows["scoring"] == ", ".join(f"{name} computed" for name in columns)


def test_json_has_the_rows_of_the_table(tmp_path, capsys):
    write_cache(tmp_path, make_manifest())
    assert main(["inspect", "--path", str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert main(["inspect", "--path", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    errors = {f"{name}_error" for name, value in rows.items() if isinstance(value, float)}
    names = [line.split("  ")[0] for line in table]
    assert names == [name for name in rows if name not in errors]  # one row with the mean
    assert rows["kind"] == "cache" and isinstance(rows["mean_entropy"], float)


def killed(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_unfinished_training_run_is_described(tmp_path, capsys, monkeypatch):
    write_pipeline(tmp_path)
    paths = {name: str(tmp_path / name) for name in ("student", "cache")}
    out, steps = tmp_path / "run", {"max_steps": 4, "save_every": 2, "log_every": 2}
    config = DistillConfig(**paths, out=str(out), **steps, device="cpu")
    monkeypatch.setattr("lopd.training.result.export", killed)
    with pytest.raises(KeyboardInterrupt):
        distill.main(config)
    capsys.readouterr()
    assert main(["inspect", "--path", str(out)]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    rows = {name: text.strip() for name, text in rows.items()}
    assert (rows["kind"], rows["continues from"]) == ("checkpoint", "step 4")
    assert rows["checkpoint-2"] == rows["checkpoint-4"] == "whole"
    assert rows["last log"].startswith("step 4, loss ")
    next((out / "checkpoint-4").glob("*.safetensors")).write_bytes(b"")
    assert main(["inspect", "--path", str(out)]) == 0
    assert "continues from step 2" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", "--path", str(out), "--verify"]) == 2
    assert "is unfinished, and has no hashes" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["inspect", "--verify"], ["verify"]])
def test_an_altered_manifest_is_found_and_one_without_a_digest_is_read(tmp_path, capsys, command):
    write_cache(tmp_path, make_manifest())
    assert main([*command, "--path", str(tmp_path)]) == 0
    file = tmp_path / "manifest.json"
    raw = json.loads(file.read_text())
    raw["created"] = "yesterday"
    file.write_text(json.dumps(raw))
    capsys.readouterr()
    assert main([*command, "--path", str(tmp_path)]) == 2
    assert "altered since it was written" in capsys.readouterr().err
    del raw["sha256"]  # as older versions wrote it
    file.write_text(json.dumps(raw))
    assert main([*command, "--path", str(tmp_path)]) == 0


@pytest.mark.parametrize("kind", ["rollouts", "sft_data", "cache"])
def test_an_unfinished_folder_is_described_and_verify_says_what_is_missing(tmp_path, capsys, kind):
    write = write_cache if kind == "cache" else write_rollouts
    write(tmp_path, make_manifest(kind, plan=(1, 2, 1)))
    (tmp_path / "shard-00001.json").unlink()
    assert main(["inspect", "--path", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in printed.out.splitlines())
    assert (rows["shards"], rows["missing_shards"], rows["sequences"]) == ("3", "1", "2")
    stage = make_manifest(kind).stage
    assert f"1 of 3 shards are unfinished or damaged; 'lopd {stage} --out" in printed.err
    assert "\n  shard-00001.json: the receipt is missing; run the stage again" in printed.err
    assert main(["inspect", "--path", str(tmp_path), "--verify"]) == 2
    assert "1 of 3 shards are unfinished or damaged; the first is " in capsys.readouterr().err


def test_a_model_of_another_origin_is_described_without_hashing_it(tmp_path, capsys, monkeypatch):
    model = write_model(tmp_path / "model")
    monkeypatch.setattr("lopd.provenance.fingerprint.fingerprint_weights", None)
    assert main(["inspect", str(model), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["kind"] == "a model that lopd did not write" and rows["model"] == str(model)
    size = (model / "model.safetensors").stat().st_size
    assert rows["weights"] == f"1 files, {size} bytes" and rows["vocabulary"] > 20
    assert rows["ends answers with"].startswith("id ") and rows["chat template"] == "none"
    assert main(["inspect", str(model), "--verify"]) == 2
    assert "has no recorded hashes; leave --verify out" in capsys.readouterr().err
