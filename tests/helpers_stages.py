"""Rollouts of tiny models, and stage commands in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import TEXT

from lopd.cli import main
from lopd.provenance import declare

COMMON = ["--dtype", "float32", "--device", "cpu"]
# Loads what takes long once, then forks the workers: argv[1] of them, the first argv[2] of which
# are killed after their first shard.
FORK = """
import os, signal, sys
import torch
from lopd.store import CacheWriter, RolloutWriter
from lopd.cli import main
from lopd.stages import rollout, score
from lopd.engines import transformers as hf
torch.set_num_threads(1)
count, doomed, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
def die_after(writer):
    write = writer.write
    def writing(self, *args):
        write(self, *args)
        os.kill(os.getpid(), signal.SIGKILL)
    writer.write = writing
children = []
for index in range(count):
    child = os.fork()
    if not child:
        if index < doomed:
            die_after(CacheWriter)
            die_after(RolloutWriter)
        os._exit(main([*argv, "--worker", f"{index}/{count}"]))
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def fork_workers(count, argv, doomed=0):
    """Exit codes of `count` real processes that run one command as workers."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(count), str(doomed), *map(str, argv)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def shard_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("shard-*"))}


def write_prompts(path, count=10, **more):
    words = TEXT.split()
    records = [{"prompt": " ".join(words[i : i + 3]), **more} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rollout_argv(student, prompts, out, *flags):
    argv = ["rollout", "--student", student, "--prompts", prompts, "--out", out]
    argv += ["--max-new-tokens", "8", "--num-samples", "2", "--shard-size", "6", *COMMON, *flags]
    return list(map(str, argv))


def score_argv(teacher, rollouts, out, *flags):
    argv = ["score", "--teacher", teacher, "--rollouts", rollouts, "--out", out]
    return list(map(str, [*argv, "--k", "6", *COMMON, *flags]))


def make_rollouts(student, folder):
    """20 sequences in 4 shards."""
    prompts = write_prompts(folder / "prompts.jsonl")
    assert main(rollout_argv(student, prompts, folder / "rollouts")) == 0
    return folder / "rollouts"


def declared(student_folder, teacher_folder, parent):
    """A copy of the student that says that it was fine-tuned on the teacher's answers."""
    folder = shutil.copytree(student_folder, parent / "student")
    declare(folder, teacher=teacher_folder)
    return folder


def one_line(capsys) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("lopd ") and " error: " in line]
    assert len(errors) == 1, lines
    return errors[0]
