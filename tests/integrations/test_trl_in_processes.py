"""The TRL trainer in two processes takes the steps of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_artefacts import trained_weights, write_pipeline
from helpers_training import SAME_UPDATE, update_error

from lopd.provenance import read_manifest

pytest.importorskip("trl", reason="part of the extra `trl`")

# Twelve sequences are a step; argv: folder, out, micro-batch size, micro-batches, padding.
RUN = """
import sys
import time
from pathlib import Path
import torch
import trl.trainer.sft_trainer as sft
torch.set_num_threads(1)
from lopd import TeacherCache
from lopd.integrations.trl import OfflineDistillationConfig, OfflineDistillationTrainer
folder, out, size, count, padding = sys.argv[1:]
args = OfflineDistillationConfig(
    out, max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, bf16=False,
    per_device_train_batch_size=int(size), gradient_accumulation_steps=int(count),
    save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
    padding_free=padding == "none", per_device_eval_batch_size=int(size),
)
cache = TeacherCache.open(f"{folder}/cache")
verified, verify, build = Path(f"{out}.verified"), TeacherCache.verify, sft.create_model_from_path
def slowly(self):
    time.sleep(1)
    verify(self)
    verified.touch()
def after_verifying(*args, **kwargs):
    assert verified.exists(), "built before the shards were verified"
    return build(*args, **kwargs)
TeacherCache.verify, sft.create_model_from_path = slowly, after_verifying
trainer = OfflineDistillationTrainer(f"{folder}/student", args, cache)
trainer.train()
log = [entry["reverse_kl"] for entry in trainer.state.log_history if "loss" in entry]
log.append(trainer.evaluate(cache)["eval_loss"])
if trainer.is_world_process_zero():
    model = trainer.accelerator.unwrap_model(trainer.model)
    torch.save({"log": log, "weights": model.state_dict()}, f"{out}.pt")
trainer.save_model(out)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def run(folder, out, size, count, processes, padding="right"):
    script = out.parent / "run.py"
    script.write_text(RUN)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = map(str, (script, folder, out, size, count, padding))
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(f"{out}.pt")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    folder = write_pipeline(tmp_path / "pipeline")
    start = trained_weights(folder / "student")
    one = run(folder, tmp_path / "one", 4, 3, 1)
    two = run(folder, tmp_path / "two", 3, 2, 2, padding="none")
    assert len(two["log"]) == 4 and two["log"] == pytest.approx(one["log"], rel=1e-4)
    trained = [{name: run["weights"][name] for name in start} for run in (one, two)]
    assert update_error(*trained, start) < SAME_UPDATE
    assert read_manifest(tmp_path / "two").overrides == ()
