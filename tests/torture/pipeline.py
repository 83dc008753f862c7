"""The commands under attack, at toy scale: their inputs, and uninterrupted results."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
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
UNSEEN = ("checkpoint-", "torn-", ".lock", ".start.lock")  # not part of a result
# What differs between two runs of the same command: when and where they ran, and how fast.
TIMED = {"tokens_per_second", "seconds", "created", "environment", "path", "config", "mfu"}
TIMED |= {"peak_mib", "eval_seconds"}  # of the demo


# A recipe for `lopd run`; JSON is YAML.
RECIPE: dict[str, dict[str, object]] = {
    "sft-data": {"max_new_tokens": 8, "shard_size": 6},
    "sft": {"max_steps": 2, "batch_size": 2, "save_every": 1},
    "rollout": {"max_new_tokens": 8, "shard_size": 6},
    "score": {"k": 6},
    "distill": {"max_steps": 2, "batch_size": 2, "save_every": 1},
    "eval": {"max_new_tokens": 6, "num_samples": 1},
}


@dataclass(frozen=True)
class Stage:
    """One command; `argv(out)` writes into `out`, or makes what the command changes there."""

    name: str
    argv: Callable[[Path], list[object]]
    out: Path  # the uninterrupted result
    share: int = 4  # of the attacks; less for what takes long
    in_place: bool = False  # the command adds to a folder that is there


class Pipeline:
    """Models, prompts and one uninterrupted run of every command, below `root`.

    Args:
        whole: include `lopd run` and `lopd demo`, which take as long as all others.
    """

    def __init__(self, root: Path, *, whole: bool = True) -> None:
        self.root = root
        self.seconds: dict[str, float] = {}
        self._make_inputs()
        self.stages = {stage.name: stage for stage in self._stages()}
        if whole:
            self.stages |= {stage.name: stage for stage in self._whole()}
        for stage in self.stages.values():
            if stage.name == "import":
                _dump(root / "score", root / "dump.jsonl")
            done = harness.run(stage.argv(stage.out))
            assert done.code == 0, done.text
            self.seconds[stage.name] = done.seconds
        most = max(stage.share for stage in self.stages.values())
        self.order = [
            stage for turn in range(most) for stage in self.stages.values() if stage.share > turn
        ]

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
        dump = ("--source", root / "dump.jsonl", "--shard-size", 3, "--student", sft)
        evaluate = ("eval", "--model", root / "distill", *prompts, "--max-new-tokens", 6)
        best = (*distill, "--holdout", 0.3, "--eval-steps", 2, "--keep-best")
        commands: dict[str, tuple[object, ...]] = {
            "sft-data": ("sft-data", *teacher, *sample),
            "sft": ("sft", *model, *TRAIN, *COMMON),
            "rollout": ("rollout", "--student", sft, *sample),
            "score": score,
            "score compact": (*score, "--codec", "compact"),
            "import": ("import", *dump, "--format", "topk", *teacher),
            "import rollouts": ("import", *dump, "--format", "rollouts"),
            "calibrate": ("calibrate", "--cache", root / "score"),
            "distill": distill,
            "distill keep_best": best,
            "distill LoRA": (*distill, "--lora-rank", 2),
            "eval": (*evaluate, *teacher, "--num-samples", 2, *COMMON),
        }
        return [
            *(
                Stage(name, _out(*words), root / name.replace(" ", "-"))
                for name, words in commands.items()
            ),
            Stage("declare", self._declare, root / "declare", 2, in_place=True),
            Stage("report", self._report, root / "report", 2),
        ]

    def _whole(self) -> list[Stage]:
        _shrink_demo()
        return [
            Stage("run", self._run, self.root / "run", 2),
            Stage("demo", _out("demo"), self.root / "demo", 1),
        ]

    def _declare(self, out: Path) -> list[object]:
        if not out.exists():
            shutil.copytree(self.root / "student", out)
        return ["declare", "--model", out, "--teacher", self.root / "teacher"]

    def _report(self, out: Path) -> list[object]:
        page, evaluation = out / "report.html", self.root / "eval"
        return ["report", self.root / "distill", "--evals", evaluation, "--out", page, *COMMON]

    def _run(self, out: Path) -> list[object]:
        root, prompts = self.root, {"prompts": str(self.root / "prompts.jsonl")}
        stages = {
            name: settings | (prompts if name in ("sft-data", "rollout", "eval") else {})
            for name, settings in RECIPE.items()
        }
        recipe = {
            **{"out": str(out), "teacher": str(root / "teacher"), "device": "cpu"},
            **{"student": str(root / "student"), "dtype": "float32", "stages": stages},
        }
        file = root / f"run-{out.name}.yaml"
        file.write_text(json.dumps(recipe))
        return ["run", file]


def _out(*words: object) -> Callable[[Path], list[object]]:
    return lambda out: [*words, "--out", out]


def _shrink_demo() -> None:
    """Give the demo a few prompts and steps, in this process and its forks."""
    from lopd.stages.demo import toy

    toy.PROMPTS.update(eval=6, demonstrations=8, sft=6, opd=6)
    toy.SFT_STEPS.update(teacher=2, student=2)
    toy.OPD_SETTINGS.update(max_steps=2)
    for settings in (toy.SFT_SETTINGS, toy.OPD_SETTINGS):
        settings.update(batch_size=4, warmup_steps=0)


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
    """sha256 of every file of a result, by name, without what differs between equal runs."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(UNSEEN) for part in name.parts):
            continue
        data = path.read_bytes()
        if name.name in ("manifest.json", "recipe.json", "results.json", "progress.json"):
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
