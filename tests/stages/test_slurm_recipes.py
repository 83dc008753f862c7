"""The scripts for Slurm, with its variables and commands played by the tests."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_artefacts import trained_weights
from helpers_training import SAME_UPDATE, update_error
from torch.distributed.launcher.api import LaunchConfig

from lopd import DistillConfig, ScoreConfig, distill, score

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "recipes").glob("*.sbatch"))
ARRAY, TORCHRUN = (ROOT / "recipes" / f"slurm-{name}.sbatch" for name in ("array", "torchrun"))


@pytest.fixture
def commands(tmp_path):
    """A folder with the commands that the scripts call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "lopd": f'exec {sys.executable} -m lopd.cli "$@"',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "scontrol": '[ "$*" = "show hostnames node[1-2]" ]; printf "localhost\\nnode2\\n"',
        # the command once for each node, at the same time
        "srun": 'set -e; "$@" & first=$!; "$@" & wait $first; wait $!',
    }
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\nset -e\n{line}\n")
        (folder / name).chmod(0o755)
    return folder


def submit(script, commands, *arguments, **variables):
    environment = {
        **os.environ,
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(random.randrange(10**6)),  # decides a port
        **{f"SLURM_{name}": str(value) for name, value in variables.items()},
    }
    done = subprocess.run(
        ["bash", str(script), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shard-*")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_valid_and_listed(script):
    text = script.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert text.startswith("#!/bin/bash\n") and "\nset -euo pipefail\n" in text
    head, _, body = text.partition("set -euo pipefail")
    assert head.count("\n#SBATCH --") >= 5 and "#SBATCH" not in body  # Slurm stops reading there
    readme = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert f"| `recipes/{script.name}` |" in readme


def test_torchrun_leaves_time_for_a_checkpoint(monkeypatch):
    """As long as Slurm does, between the signal and the end of the job."""
    text = TORCHRUN.read_text(encoding="utf-8")
    (name, seconds), (before,) = (
        re.search(pattern, text, re.MULTILINE).groups()
        for pattern in (r"^export (TORCH\w+)=(\d+)$", r"^#SBATCH --signal=TERM@(\d+)$")
    )
    monkeypatch.setenv(name, seconds)
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1)
    assert 30 < int(seconds) < int(before)
    if hasattr(config, "shutdown_timeout"):  # older versions always wait 30 seconds
        assert config.shutdown_timeout == int(seconds)


@pytest.mark.thorough
def test_the_jobs_of_an_array_share_a_folder(pipeline, tmp_path, commands):
    settings = {
        "teacher": str(pipeline / "teacher"),
        "rollouts": str(pipeline / "rollouts"),
        "k": 4,
    }
    score(ScoreConfig(out=str(tmp_path / "alone"), device="cpu", **settings))
    flags = [f"--{name}={value}" for name, value in settings.items()]
    said = [
        submit(
            ARRAY,
            commands,
            *["score", *flags, f"--out={tmp_path / 'cache'}", "--device=cpu"],
            ARRAY_TASK_ID=3 + index,
            ARRAY_TASK_MIN=3,
            ARRAY_TASK_COUNT=2,
        )
        for index in range(2)
    ]
    assert (
        shards(tmp_path / "cache") == shards(tmp_path / "alone")
        and len(shards(tmp_path / "cache")) == 4
    )
    assert "finished" in said[1]  # the first job did what the second left


@pytest.mark.slow
def test_two_nodes_train_as_one_process_does(pipeline, tmp_path, commands):
    settings = {
        "student": str(pipeline / "student"), "cache": str(pipeline / "cache"), "device": "cpu",
        "max_steps": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    distill(DistillConfig(out=str(tmp_path / "alone"), batch_size=4, **settings))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    submit(
        TORCHRUN,
        commands,
        *["distill", *flags, f"--out={tmp_path / 'two'}", "--batch-size=2"],
        JOB_NODELIST="node[1-2]",
        NNODES=2,
        GPUS_ON_NODE=1,
    )
    start, alone, two = (
        trained_weights(folder)
        for folder in (pipeline / "student", tmp_path / "alone", tmp_path / "two")
    )
    assert update_error(two, alone, start) < SAME_UPDATE
