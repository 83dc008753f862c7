"""Scoring that is killed, or that gets invalid sequences or a faulty engine."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_qwen3

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.store import RolloutStore

pytestmark = pytest.mark.thorough

# One interpreter with everything imported, which forks a child for each life of the command.
LIVES = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
from tqdm import tqdm
from lopd.store import TeacherCache
from lopd.cli import main

# By default bars share a lock across fork, which a killed child would keep for ever.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0
kills, root, *argv = sys.argv[1:]
root, rng, died_early, redone, runs, seen = Path(root), random.Random(0), 0, [], 0, {}


def finished(folder):
    if not (folder / "manifest.json").exists():
        return {}
    cache = TeacherCache.open(folder, allow_incomplete=True)
    names = [f"shard-{n:05d}" for n in set(range(cache.num_shards)) - set(cache.missing_shards)]
    files = [folder / (name + end) for name in names for end in (".json", ".safetensors")]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def life(folder, seconds):
    child = os.fork()
    if child == 0:
        os._exit(main([*argv, "--out", str(folder)]))
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


assert main([*argv, "--out", str(root / "whole")]) == 0
began = time.monotonic()
assert main([*argv, "--out", str(root / "timed")]) == 0
whole = time.monotonic() - began
for _ in range(int(kills)):
    folder = root / f"run-{runs}"
    code = life(folder, rng.uniform(0.2, 0.9) * whole)
    now = finished(folder)
    redone += [name for name, state in seen.items() if now.get(name) != state]
    seen = now
    assert code in (-9, 0), code
    died_early += code == -9 and 0 < len(now) < len(finished(root / "whole"))
    if code == 0:
        runs, seen = runs + 1, {}
folder = root / f"run-{runs}"
assert main([*argv, "--out", str(folder)]) == 0
now = finished(folder)
redone += [name for name, state in seen.items() if now.get(name) != state]
digests = {TeacherCache.open(path).digest() for path in (root / "whole", *root.glob("run-*"))}
print(json.dumps({"digests": len(digests), "redone": redone, "died_early": died_early}))
"""


COMMON = ["--dtype", "float32", "--device", "cpu"]


def roll_out(student, write_jsonl, out):
    prompts = write_jsonl([{"prompt": "the cat sat"}, {"prompt": "a dog"}])
    sample = ["--prompts", str(prompts), "--num-samples", "20", "--shard-size", "1"]
    argv = ["rollout", "--student", str(student), "--out", str(out), *sample]
    assert main([*argv, "--max-new-tokens", "8", *COMMON]) == 0
    return ["score", "--rollouts", str(out), "--k", "6", *COMMON]


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_nothing_is_lost_or_redone(
    teacher_folder, student_folder, write_jsonl, tmp_path, kills
):
    score = roll_out(student_folder, write_jsonl, tmp_path / "rollouts")
    argv = [*score, "--teacher", str(teacher_folder), "--codec", "compact"]
    command = [sys.executable, "-c", LIVES, str(kills), str(tmp_path), *argv]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["digests"] == 1 and found["redone"] == []
    assert found["died_early"] >= kills // 5, "too few kills met a run that was writing"


def without_last(scores):
    return {"topk_ids": scores.topk_ids[:, :-1], "topk_logprobs": scores.topk_logprobs[:, :-1]}


def without_first_row(scores):
    return {field.name: getattr(scores, field.name)[1:] for field in dataclasses.fields(scores)[:5]}


BAD_ENGINES = {
    "nan own": (
        lambda s: {"teacher_logprobs": s.teacher_logprobs * np.float32("nan")},
        "logprobs of response token 0",
    ),
    "nan list": (
        lambda s: {"topk_logprobs": s.topk_logprobs * np.float32("nan")},
        "topk_logprobs of",
    ),
    "nan tail": (
        lambda s: {"tail_logprobs": s.tail_logprobs * np.float32("nan")},
        "tail_logprobs of",
    ),
    "nan entropy": (
        lambda s: {"teacher_entropy": s.teacher_entropy * np.float32("nan")},
        "entropy of response",
    ),
    "k too small": (without_last, r"topk_logprobs is float32 \[\d, 5\], expected floats"),
    "tokens too few": (without_first_row, "logprobs is float32"),
    "shifted": (
        lambda s: {"teacher_logprobs": np.roll(s.teacher_logprobs, 1)},
        "entry in its list|than the tail",
    ),
}


@pytest.mark.parametrize("change, message", BAD_ENGINES.values(), ids=BAD_ENGINES)
def test_an_engine_that_cannot_be_right_is_refused_by_sequence_and_keeps_what_was_done(
    teacher_folder, student_folder, write_jsonl, tmp_path, monkeypatch, capsys, change, message
):
    argv = roll_out(student_folder, write_jsonl, tmp_path / "rollouts")
    argv += ["--teacher", str(teacher_folder), "--out", str(tmp_path / "cache")]
    right, calls = TransformersEngine.score, []

    def wrong(self, sequences, *args, **kwargs):
        scores = right(self, sequences, *args, **kwargs)
        calls.append(len(sequences))
        long = (
            len(scores[0].teacher_logprobs) > 2
        )  # a shift by one shows where there is room for it
        if len(calls) < 3 or not long:
            return scores
        return [dataclasses.replace(item, **change(item)) for item in scores]

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "score", wrong)
        assert main(argv) == 2
    error = capsys.readouterr().err
    assert re.search(f"sequence .*{message}", error), error
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("shard-*")}
    assert len(kept) == 2 * (len(calls) - 1) >= 4
    assert main(argv) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_sequence_beyond_the_teachers_context_is_refused(
    student_folder, write_jsonl, tmp_path, capsys
):
    argv = roll_out(student_folder, write_jsonl, tmp_path / "rollouts")
    sequences = list(RolloutStore.open(tmp_path / "rollouts"))
    longest = max(range(len(sequences)), key=lambda i: len(sequences[i].tokens))
    name, length = sequences[longest].prompt_id, len(sequences[longest].tokens)
    short = save_qwen3(tmp_path / "short", seed=3, max_position_embeddings=length - 1)
    for more in ([], ["--plan"]):
        assert main([*argv, "--teacher", str(short), "--out", str(tmp_path / "out"), *more]) == 2
        error = capsys.readouterr().err
        assert f"sequence {name}/" in error
        assert f"at most {length - 1}, the context of the teacher" in error
    assert not (tmp_path / "out").exists()


def test_an_id_beyond_the_teachers_vocabulary_is_refused(
    student_folder, write_jsonl, tmp_path, capsys
):
    argv = roll_out(student_folder, write_jsonl, tmp_path / "rollouts")
    largest = max(int(r.tokens.max()) for r in RolloutStore.open(tmp_path / "rollouts"))
    small = save_qwen3(tmp_path / "small", seed=3, vocab_size=largest)
    assert main([*argv, "--teacher", str(small), "--out", str(tmp_path / "out"), "--k", "3"]) == 2
    assert f"ids in [0, {largest}), the vocabulary of the teacher" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
