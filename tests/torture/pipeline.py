"""The stages under attack, at toy scale: their commands, inputs, and uninterrupted results."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from conftest import TEXT, save_qwen3
from torture import harness

from lopd.provenance.identity import NOT_RECIPE
from lopd.provenance.io import without_keys
from lopd.provenance.manifest import DIGEST
from lopd.store import TeacherCache

COMMON = ("--dtype", "float32", "--device", "cpu")
TRAIN = ("--max-steps", 6, "--batch-size", 2, "--learning-rate", "1e-3", "--save-every", 2)
# What differs between two runs of the same command: when and where they ran, and how fast.
TIMED = {"tokens_per_second", "seconds", "created", "environment", "path", "config", "mfu"}


@dataclass(frozen=True)
class Stage:
    """One command; `argv(out)` writes into `out`."""

    name: str
    words: tuple[object, ...]
    out: Path  # the uninterrupted result

    def argv(self, out: Path) -> list[object]:
        return [*self.words, "--out", out]


class Pipeline:
    """Models, prompts and one uninterrupted run of every stage, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.seconds: dict[str, float] = {}
        self._make_inputs()
        self.stages = {stage.name: stage for stage in self._stages()}
        for stage in self.stages.values():
            if stage.name == "import":
                _dump(root / "score", root / "dump.jsonl")
            done = harness.run(stage.argv(stage.out))
            assert done.code == 0, done.text
            self.seconds[stage.name] = done.seconds

    def reference(self, name: str) -> dict[str, str]:
        return contents(self.stages[name].out)

    def _make_inputs(self) -> None:
        teacher, student = self.root / "teacher", self.root / "student"
        _in_fork(lambda: save_qwen3(teacher, seed=1, num_hidden_layers=2))
        _in_fork(lambda: save_qwen3(student, seed=2))
        words = TEXT.split()
        records = [{"prompt": " ".join(words[i : i + 3]), "answer": words[i]} for i in range(12)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.root / "prompts.jsonl").write_text(lines)

    def _stages(self) -> list[Stage]:
        root = self.root
        prompts = ("--prompts", root / "prompts.jsonl")
        sample = (*prompts, "--max-new-tokens", 8, "--shard-size", 3, *COMMON)
        teacher, sft = ("--teacher", root / "teacher"), root / "sft"
        score = ("score", *teacher, "--rollouts", root / "rollout", "--k", 6, *COMMON)
        distill = ("distill", "--student", sft, "--cache", root / "score", *TRAIN, *COMMON)
        model = ("--model", root / "student", "--data", root / "sft-data")
        dump = ("--source", root / "dump.jsonl", "--format", "topk", "--shard-size", 3)
        evaluate = ("eval", "--model", root / "distill", *prompts, "--max-new-tokens", 6)
        return [
            Stage("sft-data", ("sft-data", *teacher, *sample), root / "sft-data"),
            Stage("sft", ("sft", *model, *TRAIN, *COMMON), sft),
            Stage("rollout", ("rollout", "--student", sft, *sample), root / "rollout"),
            Stage("score", score, root / "score"),
            Stage("score compact", (*score, "--codec", "compact"), root / "score-compact"),
            Stage("import", ("import", *dump, *teacher, "--student", sft), root / "import"),
            Stage("distill", distill, root / "distill"),
            Stage(
                "distill keep_best",
                (*distill, "--holdout", 0.3, "--eval-steps", 2, "--keep-best"),
                root / "distill-best",
            ),
            Stage("distill LoRA", (*distill, "--lora-rank", 2), root / "distill-lora"),
            Stage("eval", (*evaluate, *teacher, "--num-samples", 2, *COMMON), root / "eval"),
        ]


def _dump(cache: Path, file: Path) -> None:
    """The scores of a cache as another tool would write them."""
    with file.open("w") as lines:
        for item in TeacherCache.open(cache):
            ids, prompt = item.rollout.tokens.tolist(), item.rollout.prompt_length
            lists = item.lists.split(np.arange(len(item.teacher_logprobs) + 1))
            record = {
                "prompt_token_ids": ids[:prompt],
                "response_token_ids": ids[prompt:],
                "topk_ids": [part.ids.tolist() for part in lists],
                "topk_logprobs": [part.logprobs.tolist() for part in lists],
            }
            lines.write(json.dumps(record) + "\n")


def _in_fork(make) -> None:
    """Call `make` in a child, since torch must stay unused in the process that forks."""
    import os

    pid = os.fork()
    if pid == 0:
        try:
            make()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file of a result, by name, without what differs between equal runs.

    Checkpoints and locks are left out: they serve the run and are not part of its result.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or name.parts[0].startswith(
            ("checkpoint-", "torn-", ".lock", ".start.lock")
        ):
            continue
        data = path.read_bytes()
        if name.name in ("manifest.json", "recipe.json", "results.json"):
            value = json.loads(data)
            value.pop(DIGEST, None)  # of a manifest, times included
            data = _canonical(without_keys(value, TIMED | NOT_RECIPE))
        elif name.name == "train_log.jsonl":
            rows = [json.loads(line) for line in data.splitlines()]
            data = _canonical([_untimed(row) for row in rows])
        found[str(name)] = hashlib.sha256(data).hexdigest()
    return found


def _untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "second" not in key and key not in TIMED}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """Names of files that differ, in words; empty if none does."""
    names = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
    return ", ".join(names)


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
