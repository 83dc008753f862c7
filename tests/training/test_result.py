"""The export of a run, what is tried before training, and a disk that is full."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_artefacts import distill_config, trained_weights
from helpers_training import flags_of, largest_difference

from lopd.cli import main
from lopd.errors import ModelError, ShardError
from lopd.models.load import load_model
from lopd.provenance.folder_receipt import RECEIPT_NAME, check_receipt
from lopd.stages import distill, sft
from lopd.training import result
from lopd.training.checkpoints import checkpoints, last_checkpoint
from lopd.training.trainer import LopdTrainer

SETTINGS = {"batch_size": 4, "learning_rate": 1e-2, "device": "cpu", "max_steps": 2}


config = partial(distill_config, **SETTINGS)


def test_the_result_has_a_receipt_of_its_files(pipeline, tmp_path, capsys):
    out = distill.main(config(pipeline, tmp_path / "out"))
    files = check_receipt(out)["files"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < {
        *files
    }
    assert not any(name.startswith("checkpoint") for name in files)
    assert main(["verify", "--path", str(out)]) == 0
    assert main(["inspect", "--path", str(out), "--verify"]) == 0
    assert f"all {len(files)} files" in capsys.readouterr().out
    settings = json.loads((out / "generation_config.json").read_text())
    (out / "generation_config.json").write_text(json.dumps({**settings, "top_k": 3}))
    for command in (["verify"], ["inspect", "--verify"]):
        assert main([*command, "--path", str(out)]) == 2
        assert "generation_config.json: " in capsys.readouterr().err


def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(
    pipeline, tmp_path, monkeypatch
):
    model = shutil.copytree(pipeline / "student", tmp_path / "model")
    (model / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+2=", "completion": "3"}\n' * 4)
    monkeypatch.setattr(LopdTrainer, "train", lambda *args, **kwargs: 1 / 0)
    settings = {"model": str(model), "data": str(tmp_path / "data.jsonl"), **SETTINGS}
    with pytest.raises(ModelError, match="loaded, but not saved again.*set do_sample to true in"):
        sft.main(sft.SftConfig(out=str(tmp_path / "out"), **settings))


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(
    pipeline, tmp_path, monkeypatch
):
    """Weights and two moments in each of 3 checkpoints, and the weights of the result."""
    usage = namedtuple("usage", "free")
    model = load_model(str(pipeline / "student"), dtype="float32", device="cpu")
    size = sum(p.nbytes for p in model.parameters())
    settings = {"max_steps": 9, "save_every": 1}
    needed = size * (3 * 3 + 1)
    monkeypatch.setattr(result.shutil, "disk_usage", lambda path: usage(needed - 1))
    with monkeypatch.context() as patch:
        patch.setattr(LopdTrainer, "train", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ShardError, match="free space; expected at least .* for 3 checkpoints"):
            distill.main(config(pipeline, tmp_path, **settings))
    monkeypatch.setattr(result.shutil, "disk_usage", lambda path: usage(needed))
    assert len(checkpoints(distill.main(config(pipeline, tmp_path, **settings)))) == 2


@pytest.mark.parametrize("keep_best", [False, True])
def test_adapters_trained_in_mixed_precision_are_merged(pipeline, tmp_path, keep_best):
    """The check of the merge compares two float32 forwards."""
    changes = {"lora_rank": 4, "mixed_precision": "bf16"}
    if keep_best:
        changes |= {"holdout": 3, "eval_steps": 1, "keep_best": True}
    out = distill.main(config(pipeline, tmp_path / "out", **changes))
    start, end = (trained_weights(folder) for folder in (pipeline / "student", out))
    assert largest_difference(start, end) > 1e-3
    assert all(value.dtype == torch.float32 for value in end.values())
    assert (out / "adapter" / "adapter_config.json").is_file()


# For each "LIMIT:FOLDER": a process in which writes beyond LIMIT bytes of a file fail after step 1.
FULL = """
import os, resource, sys
import torch
from lopd.cli import main
from lopd.training.trainer import LopdTrainer
torch.set_num_threads(1)
step = LopdTrainer.training_step
codes = []
for case in sys.argv[1].split(","):
    limit, out = case.split(":")
    child = os.fork()
    if not child:
        def training_step(self, *args):
            if self.state.global_step == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
            return step(self, *args)
        LopdTrainer.training_step = training_step
        os._exit(main([*sys.argv[2:], f"--out={out}"]))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes)
"""


@pytest.mark.thorough
def test_a_full_disk_is_one_line_and_loses_no_checkpoint(pipeline, tmp_path):
    """The limits cut the weights, the optimizer's state and the small files of a checkpoint."""
    changes = {"max_steps": 3, "save_every": 1}
    whole = distill.main(config(pipeline, tmp_path / "whole", **changes))
    sizes = {file.name: file.stat().st_size for file in (whole / "checkpoint-3").iterdir()}
    limits = (sizes["model.safetensors"] // 2, sizes["model.safetensors"] + 4096, 1024)
    assert sizes["optimizer.pt"] > limits[1]
    settings = {"student": pipeline / "student", "cache": pipeline / "cache", **SETTINGS, **changes}
    flags = flags_of(settings)
    cases = ",".join(f"{limit}:{tmp_path / str(limit)}" for limit in limits)
    done = subprocess.run(
        [sys.executable, "-c", FULL, cases, "distill", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == "[2, 2, 2]", done.stderr
    assert len(re.findall(r"lopd distill: error: .*not written \(.*\)", done.stderr)) == 3
    assert [last_checkpoint(tmp_path / str(n)).name for n in limits] == ["checkpoint-1"] * 3
    out = distill.main(config(pipeline, tmp_path / str(limits[1]), **changes))
    assert (out / RECEIPT_NAME).read_bytes() == (whole / RECEIPT_NAME).read_bytes()
