"""Runs in two processes and with adapters, compared with one process and a plain model."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers_artefacts import distill_config, trained_weights, write_pipeline
from helpers_training import SAME_UPDATE, flags_of, largest_difference, update_error
from safetensors.torch import load_file

from lopd.errors import ConfigError
from lopd.provenance import ModelIdentity, read_manifest
from lopd.stages import distill
from lopd.training.checkpoints import ADAPTER_WEIGHTS, checkpoints, unusable

pytestmark = pytest.mark.thorough

SETTINGS = {"learning_rate": 1e-2, "max_steps": 5, "device": "cpu", "log_every": 2, "save_every": 2}
# The script of each process; argv[1] is the step at which the second one is killed, 0 for never.
# accelerate ignores a request to shard on a CPU; the patch makes it shard there too.
RUN = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
init = AcceleratorState.__init__
def __init__(self, *args, fsdp_plugin=None, **kwargs):
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self.mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self.mixed_precision)
AcceleratorState.__init__ = __init__
from lopd.cli import main
from lopd.training.trainer import LopdTrainer
step = LopdTrainer.training_step
def training_step(self, *args):
    if os.environ["RANK"] == "1" and self.state.global_step + 1 == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)
LopdTrainer.training_step = training_step
code = main(sys.argv[2:])
assert code or not torch.distributed.is_initialized()
sys.exit(code)
"""


config = partial(distill_config, **SETTINGS)


def in_two_processes(script, pipeline, out, killed_at=0, **changes):
    settings = {"student": pipeline / "student", "cache": pipeline / "cache", "out": out}
    settings |= SETTINGS | changes
    flags = flags_of(settings)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *command, str(script), str(killed_at), "distill", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )


def log_of(out):
    clock = {"tokens_per_second", "epoch"}
    lines = (Path(out) / "train_log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


# Packed, 12 sequences without the held-out ones: steps of 4, the last of an epoch shorter.
PACKED = {"holdout": 2, "eval_steps": 2, "max_tokens_per_batch": 64}


@pytest.fixture(scope="module")
def single(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    return distill.main(config(pipeline, out, batch_size=4, **PACKED))


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    file = tmp_path_factory.mktemp("script") / "run.py"
    file.write_text(RUN)
    return file


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one_even_if_killed_and_resumed(
    pipeline, single, script, tmp_path, fsdp
):
    out, changes = tmp_path / "two", {**PACKED, "batch_size": 2, "fsdp": fsdp}
    done = in_two_processes(script, pipeline, out, killed_at=4, **changes)
    assert done.returncode != 0 and str(-signal.SIGKILL) in done.stderr
    assert [folder.name for folder in checkpoints(out)] == ["checkpoint-2"]
    assert not unusable(checkpoints(out)[0])
    assert (checkpoints(out)[0] / "pytorch_model_fsdp.bin").exists() == fsdp
    done = in_two_processes(script, pipeline, out, **changes)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("continues from checkpoint-2") == 1
    start, one, two = (trained_weights(folder) for folder in (pipeline / "student", single, out))
    assert largest_difference(start, one) > 1e-3
    assert update_error(two, one, start) < SAME_UPDATE
    ours, theirs = log_of(single), log_of(out)
    assert len(ours) == len(theirs) == 3 + 4
    for entry, other in zip(ours, theirs, strict=True):
        assert entry.keys() == other.keys()
        for name in entry:
            assert other[name] == pytest.approx(entry[name], rel=2e-3, abs=1e-6), name
    assert read_manifest(out).raw["training"] == read_manifest(single).raw["training"]


def test_sharded_adapters_equal_those_of_one_process(script, tmp_path):
    """With the head as a target, several micro-batches per step, killed and resumed."""
    pipeline = write_pipeline(tmp_path / "pipeline", tie_word_embeddings=False)
    changes = {"lora_rank": 3, "lora_targets": "q_proj,down_proj,lm_head"}
    single = distill.main(config(pipeline, tmp_path / "alone", batch_size=4, **changes))
    changes |= {"fsdp": True, "batch_size": 1, "gradient_accumulation_steps": 2}
    done = in_two_processes(script, pipeline, tmp_path / "two", killed_at=4, **changes)
    assert done.returncode != 0 and not unusable(tmp_path / "two" / "checkpoint-2")
    done = in_two_processes(script, pipeline, tmp_path / "two", **changes)
    assert done.returncode == 0, done.stderr
    start, one, two = (
        load_file(folder / "model.safetensors")
        for folder in (pipeline / "student", single, tmp_path / "two")
    )
    assert largest_difference(start, one) > 1e-3
    assert update_error(two, one, start) < SAME_UPDATE
    one, two = (load_file(out / "adapter" / ADAPTER_WEIGHTS) for out in (single, tmp_path / "two"))
    assert update_error(two, one, {name: 0.0 * value for name, value in one.items()}) < SAME_UPDATE


def test_mixed_precision_does_not_round_the_loss_of_a_sharded_model(pipeline, script, tmp_path):
    changes = {"fsdp": True, "mixed_precision": "bf16", "max_steps": 2, "save_every": 0}
    done = in_two_processes(script, pipeline, tmp_path / "out", batch_size=2, **changes)
    assert done.returncode == 0, done.stderr
    exact = distill.main(config(pipeline, tmp_path / "exact", batch_size=4, max_steps=2))
    for entry, other in zip(log_of(tmp_path / "out"), log_of(exact), strict=True):
        loss = torch.tensor(entry["loss"])
        assert loss.item() == pytest.approx(other["loss"], rel=2e-2)
        assert loss != loss.bfloat16().float()


def test_sharding_over_one_process_is_refused(pipeline, tmp_path):
    with pytest.raises(ConfigError, match="fsdp: found one process; expected several"):
        distill.main(config(pipeline, tmp_path / "out", fsdp=True))
    assert not (tmp_path / "out").exists()


def test_sharding_that_accelerate_ignores_is_refused(pipeline, script, tmp_path):
    plain = tmp_path / "plain.py"
    plain.write_text(RUN.replace("AcceleratorState.__init__ = __init__\n", ""))
    done = in_two_processes(plain, pipeline, tmp_path / "out", fsdp=True)
    assert done.returncode != 0
    assert "fsdp: found 2 processes on cpu; accelerate shards only over several GPUs" in done.stderr


def test_processes_wait_for_the_first_longer_than_torchs_default(pipeline, tmp_path, monkeypatch):
    """Writing a checkpoint may exceed NCCL's timeout; accelerate's first state sets the timeout."""
    import accelerate

    from lopd.training import run as runs

    asked = []

    class State:
        is_main_process = True

        def __init__(self, **kwargs):
            asked.append(kwargs)

    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda found: found)
    monkeypatch.setattr(runs, "this_worker", lambda local_rank: runs.Worker(0, 2, 0))
    base = ModelIdentity.from_json({"weights": "w", "config": "c", "tokenizer": "t"})
    found = config(pipeline, tmp_path / "out")
    assert runs.begin(found, base=base) is None
    args = found.training_arguments(tmp_path / "args")
    assert asked[0]["cpu"] and asked[0]["timeout"].total_seconds() == args.ddp_timeout > 3600


def test_a_run_of_two_processes_is_not_continued_by_one(pipeline, tmp_path, monkeypatch):
    from lopd.training import run as runs

    found = config(pipeline, tmp_path / "out")
    base = ModelIdentity.from_json({"weights": "w", "config": "c", "tokenizer": "t"})
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    monkeypatch.setattr("lopd.training.checkpoints.unusable", lambda folder, keep_best: "")
    (tmp_path / "out" / runs.RECIPE_NAME).write_text("{}")
    worker = runs.Worker(0, 2, 0)
    with pytest.raises(ConfigError):
        runs._claim(found, base, {}, worker)
    (tmp_path / "out" / "checkpoint-1").rmdir()
    runs._claim(found, base, {}, worker)
    (tmp_path / "out" / "checkpoint-1").mkdir()
    assert runs._claim(found, base, {}, worker) is not None
    with pytest.raises(ConfigError, match=r"another recipe \(processes was 2, is None\)"):
        runs._claim(found, base, {}, runs.Worker())


@pytest.mark.parametrize("keep_best", [False, True])
def test_a_run_with_adapters_resumes_and_ends_as_a_plain_model(
    pipeline, tmp_path, monkeypatch, keep_best
):
    from lopd.training.trainer import LopdTrainer

    changes = {"lora_rank": 4, "lora_alpha": 8.0, "gradient_checkpointing": True, "batch_size": 4}
    changes |= {"holdout": 2, "eval_steps": 2, "keep_best": keep_best}
    whole = distill.main(config(pipeline, tmp_path / "whole", **changes))
    step = LopdTrainer.training_step

    def killed(self, *args):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(LopdTrainer, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill.main(config(pipeline, tmp_path / "cut", **changes))
    monkeypatch.setattr(LopdTrainer, "training_step", step)
    cut = distill.main(config(pipeline, tmp_path / "cut", **changes))
    start, one, two = (trained_weights(folder) for folder in (pipeline / "student", whole, cut))
    assert largest_difference(one, two) == 0.0
    changed = {name for name in start if not torch.equal(start[name], one[name])}
    assert changed and all("proj" in name for name in changed)
    assert (cut / "adapter" / "adapter_config.json").is_file()
    assert read_manifest(cut).config["lora_rank"] == 4
    assert log_of(whole) == log_of(cut)
