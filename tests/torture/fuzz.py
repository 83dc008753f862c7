"""Mutated files against every reader: `python -m torture.fuzz --count 100000`, from tests/.

A reader accepts a file, or raises a `LopdError` of one line. Any other exception is a finding,
printed with the seed that repeats it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from helpers_artefacts import write_pipeline
from torture import mutations

from lopd.config.parse import build_config
from lopd.config.score import ScoreConfig
from lopd.config.strict_yaml import load_yaml
from lopd.data.demonstrations import load_demonstrations
from lopd.data.external_rollouts import read_rollouts
from lopd.data.external_scores import read_dump
from lopd.data.prompts import load_prompts
from lopd.data.rendering import PromptEncoder
from lopd.data.skipped import Skipped
from lopd.errors import LopdError
from lopd.models.limits import ModelLimits
from lopd.models.load import context_of, load_tokenizer
from lopd.provenance import (
    MANIFEST_NAME,
    build_manifest,
    describe_model,
    eos_ids_of,
    fingerprint_weights,
    lineage_of,
    write_manifest,
)
from lopd.provenance.fingerprint import VOCAB_NAME, chat_template_digest, load_vocab, read_config
from lopd.provenance.io import pretty_json
from lopd.stages import inspect, report, run, verify
from lopd.store.receipts import sealed
from lopd.training.checkpoints import unusable
from lopd.training.run import read_recipe

Mutation = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True)
class Target:
    """A file, its mutations, and what reads it; `weight` is its share of the mutations."""

    name: str
    file: Path
    read: Callable[[], Any]
    how: tuple[Mutation, ...]
    weight: int = 4
    seal: Callable[[], None] | None = None  # mends what binds the file, so that readers go on


@dataclass
class Findings:
    """Mutations tried by target, and the failures by where they were raised."""

    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: dict[str, tuple[int, str, str]] = field(default_factory=dict)

    def table(self) -> str:
        lines = ["| file | mutations | refused | failures |", "| --- | ---: | ---: | ---: |"]
        for name, count in sorted(self.tried.items()):
            failed = sum(n for n, target, _ in self.failures.values() if target == name)
            lines.append(f"| {name} | {count:,} | {self.refused[name]:,} | {failed:,} |")
        return "\n".join(lines)


SCORES = [
    {"prompt_token_ids": [3, 4], "response_token_ids": [7, 8], "finish_reason": "stop", "id": "a",
     "logprobs": [{"7": -0.1, "9": -3.0}, {"8": {"logprob": -0.2, "rank": 1}}]},
    {"prompt_token_ids": [3], "token_ids": [7], "topk_ids": [[7, 9]], "loss_mask": [1],
     "topk_logprobs": [[-0.1, -3.0]], "finish_reason": "length", "rollout_logprobs": [-0.5]},
    {"prompt_token_ids": [3, 4, 7], "prompt_length": 2, "finish_reason": "stop",
     "prompt_logprobs": [None, {"4": -0.5}, {"7": -1.5}]},
    {"prompt_token_ids": [3], "choices": [{"finish_reason": "stop", "logprobs": {"content": [
        {"token": "token_id:7", "logprob": -0.1,
         "top_logprobs": [{"token": "token_id:7", "logprob": -0.1}]}]}}]},
    {"prompt_token_ids": [3], "choices": [{"finish_reason": "stop", "logprobs": {"tokens": [
        "token_id:7"], "token_logprobs": [-0.1], "top_logprobs": [{"token_id:7": -0.1}]}}]},
    {"prompt_token_ids": [3], "meta_info": {"finish_reason": {"type": "stop"}, "prompt_tokens": 1,
     "output_token_logprobs": [[-0.1, 7, "a"]], "output_top_logprobs": [[[-0.1, 7, "a"]]]}},
    {"prompt_token_ids": [3], "outputs": [{"token_ids": [7], "finish_reason": "stop",
     "logprobs": [{"7": {"logprob": -0.1}}]}]},
]  # fmt: skip
ROLLOUTS = [
    {"prompt_token_ids": [3, 4], "response_token_ids": [7, 8, 9], "loss_mask": [1, 0, 1],
     "rollout_logprobs": [-0.5, None, -1.5], "finish_reason": "stop", "id": "a", "sample": 1},
    {"input_ids": [3, 4, 7, 8], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
    {"prompts": [0, 3], "responses": [7, 0], "attention_mask": [0, 1, 1, 0]},
    {"prompt_token_ids": [3], "outputs": [{"token_ids": [7], "logprobs": [{"7": -0.1}]}]},
    {"prompt_token_ids": [3], "choices": [{"token_ids": [7], "logprobs": {"content": [
        {"token": "token_id:7", "logprob": -0.1}]}}]},
    {"prompt_token_ids": [3], "meta_info": {"output_token_logprobs": [[-0.1, 7, "a"]]}},
    {"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]},
    {"prompt": [{"role": "user", "content": "3"}], "completion": [
        {"role": "assistant", "content": None}, {"role": "tool", "content": "4"}]},
]  # fmt: skip
PROMPTS = [
    {"prompt": "3 + 4 =", "id": "a", "answer": "7"},
    {"messages": [{"role": "user", "content": "3"}], "id": 2},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "3"}]}]},
]
ANSWERED = [
    {"prompt": "3 + 4 =", "completion": "7"},
    {"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]},
]
TABLES: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": "3 + 4 =", "id": name, "answer": "7"} for name in "abc"],
    "scores": [SCORES[1]] * 3,
}
LOG = [
    {"step": 0, "holdout_kl": 0.5},
    {"step": 1, "loss": 0.5, "learning_rate": 1e-3, "grad_norm": 0.5, "student_tail": 0.1},
    {"step": 2, "loss": 0.4, "learning_rate": 1e-3, "topk_overlap": 0.9, "ess_tokens": 0.8},
]
ACCURACY = {"mean": 0.5, "low": 0.25, "high": 0.75}
RESULTS = {
    "prompts": 2, "samples": 2, "greedy": ACCURACY, "avg@2": ACCURACY, "pass@2": ACCURACY,
    "truncated": 0.0, "no_answer": 0.5, "mean_tokens": 6.0, "by_length": [
        {"shortest": 1, "longest": 6, "count": 4, "accuracy": 0.5, "truncated": 0.0}],
    "kl": {"k": 8, "nats_per_token": 0.5, "exact": False, "outside_lists": 0.1},
}  # fmt: skip
SETTINGS = b"teacher: t\nrollouts: r\nout: o\nk: 8\ntop_p: 0.9\ncodec: exact\nplan: false\n"
RECIPE = b"""out: o
teacher: t
student: s
dtype: float32
stages:
  rollout:
    prompts: p
  score:
    k: 8
"""
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}="
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
LINES = (mutations.of_lines, mutations.of_bytes)
JSON = (mutations.of_json, mutations.of_json, mutations.of_bytes)
YAML = (mutations.of_yaml, mutations.of_bytes)
PARQUET = (mutations.of_rows, mutations.of_bytes)
TENSORS = (mutations.of_header, mutations.of_bytes)


def targets(root: Path) -> list[Target]:
    """Write one artefact of every kind under `root`; the files of them that are read."""
    write_pipeline(root)
    teacher, student, rollouts, cache = (
        root / name for name in ("teacher", "student", "rollouts", "cache")
    )
    tokenizer = load_tokenizer(teacher)
    tokenizer.chat_template = TEMPLATE
    encoder = PromptEncoder(tokenizer)
    inputs = {
        "prompts.jsonl": _jsonl(PROMPTS),
        "sft.jsonl": _jsonl(ANSWERED),
        "scores.jsonl": _jsonl(SCORES),
        "rollouts.jsonl": _jsonl(ROLLOUTS),
        "score.yaml": SETTINGS,
        "recipe.yaml": RECIPE,
        "recipe.json": pretty_json({"learning_rate": 1e-3, "base": {"a": None}}),
    }
    prompts, answered, scores, others, settings, recipe, run_recipe = (
        root / name for name in inputs
    )
    for name, data in inputs.items():
        (root / name).write_bytes(data)
    shard, receipt = cache / "shard-00000.safetensors", cache / "shard-00000.json"
    read_cache, read_store = partial(_read_folder, cache), partial(_read_folder, rollouts)
    read_model, read_tokenizer = partial(_read_model, teacher), partial(_read_tokenizer, teacher)
    seal_receipt, seal_shard = partial(_seal_receipt, receipt), partial(_seal_shard, shard, receipt)

    def eos() -> Any:
        return eos_ids_of(teacher)

    def rehash() -> Any:
        return fingerprint_weights(teacher, rehash=True)

    def read_others() -> Any:
        limits, skipped = ModelLimits("the student", 28), Skipped(str(others), allowed=False)
        eos = eos_ids_of(teacher)
        return list(
            read_rollouts(others, encoder, eos, limits=limits, skipped=skipped, retokenize=True)
        )

    (root / "checkpoint-5").mkdir()
    state = root / "checkpoint-5" / "trainer_state.json"
    tables = {name: _parquet(root / f"{name}.parquet", rows) for name, rows in TABLES.items()}
    log, results = student / "train_log.jsonl", _evaluation(root)
    log.write_bytes(_jsonl(LOG))
    page = partial(_read_report, student, results.parent)
    state.write_bytes(pretty_json({"global_step": 5, "best_global_step": 3, "log_history": []}))

    return [
        Target("trainer_state.json", state, lambda: unusable(state.parent, keep_best=True), JSON),
        Target("rollout dump", others, read_others, LINES, 16),
        Target("prompts", prompts, lambda: load_prompts(prompts, encoder), LINES, 12),
        Target(
            "demonstrations", answered, lambda: load_demonstrations(answered, encoder), LINES, 8
        ),
        Target("score dump", scores, lambda: list(read_dump(scores, "topk", None)), LINES, 24),
        Target(
            "prompts (parquet)",
            tables["prompts"],
            lambda: load_prompts(tables["prompts"], encoder),
            PARQUET,
        ),
        Target(
            "score dump (parquet)",
            tables["scores"],
            lambda: list(read_dump(tables["scores"], "topk", None)),
            PARQUET,
        ),
        Target("training log", log, page, LINES),
        Target("run manifest", student / MANIFEST_NAME, page, JSON),
        Target("evaluation", results, page, JSON),
        Target("settings (YAML)", settings, partial(_read_settings, settings), YAML),
        Target("recipe (YAML)", recipe, partial(_read_recipe, recipe), YAML),
        Target("run recipe", run_recipe, lambda: read_recipe(run_recipe), JSON),
        Target("cache manifest", cache / MANIFEST_NAME, read_cache, JSON, 8),
        Target("rollout manifest", rollouts / MANIFEST_NAME, read_store, JSON, 8),
        Target("student manifest", student / MANIFEST_NAME, lambda: lineage_of(student), JSON, 6),
        Target("receipt", receipt, read_cache, JSON),
        Target("sealed receipt", receipt, read_cache, JSON, 8, seal_receipt),
        Target("shard", shard, read_cache, TENSORS),
        Target("sealed shard", shard, read_cache, TENSORS, 8, seal_shard),
        Target("teacher vocabulary", cache / VOCAB_NAME, lambda: load_vocab(cache), JSON),
        Target("weights", teacher / "model.safetensors", rehash, TENSORS, 6),
        Target("config.json", teacher / "config.json", read_model, JSON),
        Target("generation_config.json", teacher / "generation_config.json", eos, JSON, 2),
        Target("tokenizer.json", teacher / "tokenizer.json", read_tokenizer, JSON, 1),
        Target("tokenizer_config.json", teacher / "tokenizer_config.json", read_tokenizer, JSON, 2),
    ]


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _read_folder(folder: Path) -> None:
    inspect.main(inspect.InspectConfig(path=str(folder)))
    verify.main(verify.VerifyConfig(path=str(folder)))


def _parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), file)
    return file


def _evaluation(root: Path) -> Path:
    """Results of an evaluation as an earlier version left them, without a receipt."""
    model = describe_model(root / "student", dtype="float32", engine="transformers")
    inputs = {"prompts": {"sha256": "a" * 64}}
    manifest = build_manifest("evaluation", stage="eval", config={}, model=model, inputs=inputs)
    write_manifest(root / "evaluation", manifest)
    file = root / "evaluation" / "results.json"
    file.write_bytes(pretty_json(RESULTS))
    return file


def _read_report(run_folder: Path, evaluation: Path) -> None:
    settings: dict[str, Any] = {"runs": str(run_folder), "evals": str(evaluation), "answers": 0}
    report.main(report.ReportConfig(**settings, out=str(evaluation / "report.html")))


def _read_settings(file: Path) -> None:
    build_config(ScoreConfig, load_yaml(file), {}, str(file), "lopd score")


def _read_recipe(file: Path) -> None:
    """As `lopd run` does before the first stage."""
    run.stage_configs(load_yaml(file), str(file))


def _read_model(folder: Path) -> None:
    read_config(folder)
    describe_model(folder, dtype="float32", engine="transformers")
    context_of(folder)


def _read_tokenizer(folder: Path) -> None:
    chat_template_digest(folder)
    load_tokenizer(folder)


def _seal_receipt(file: Path) -> None:
    """Give a mutated receipt a right digest, as only a forger would."""
    with contextlib.suppress(Exception):
        content = json.loads(file.read_bytes())
        content.pop("digest", None)
        file.write_bytes(pretty_json(sealed(content)))


def _seal_shard(shard: Path, file: Path) -> None:
    """Give the receipt the hash of a mutated shard."""
    data = shard.read_bytes()
    content = json.loads(file.read_bytes())
    content |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.pop("digest", None)
    file.write_bytes(pretty_json(sealed(content)))


def fuzz(root: Path, count: int, seed: int, only: str = "") -> Findings:
    """Mutate files `count` times, each once or a few times over, and read them.

    Args:
        only: part of the names of the targets to try; all by default.
    """
    findings = Findings()
    everything = [target for target in targets(root) if only in target.name]
    total = sum(target.weight for target in everything)
    for target in everything:
        folder = {
            item: item.read_bytes() for item in target.file.parent.iterdir() if item.is_file()
        }
        for number in range(max(1, count * target.weight // total)):
            rng = random.Random(f"{seed} {target.name} {number}")
            data = folder[target.file]
            with contextlib.suppress(
                ValueError, IndexError, TypeError, struct.error, RecursionError
            ):
                for _ in range(rng.choice((1, 1, 1, 2, 3))):
                    data = rng.choice(target.how)(rng, data)
            target.file.write_bytes(data)
            if target.seal is not None:
                target.seal()
            findings.tried[target.name] += 1
            attempt(target, f"{seed} {target.name} {number}", findings)
            for item in {target.file, *([] if target.seal is None else folder)}:
                item.write_bytes(folder[item])
    return findings


def attempt(target: Target, name: str, findings: Findings) -> None:
    """Read a file; an exception that is no error of lopd is recorded under `name`."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            target.read()
    except (LopdError, OSError) as error:
        findings.refused[target.name] += 1
        if not isinstance(error, LopdError) and not error.errno:
            _record(findings, target.name, name, error)
    except Exception as error:
        _record(findings, target.name, name, error)


def _record(findings: Findings, target: str, name: str, error: Exception) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}lopd{os.sep}" in frame.filename]
    last = (ours or frames)[-1]
    key = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
    count = findings.failures.get(key, (0, "", ""))[0]
    findings.failures[key] = (count + 1, target, f"[{name}] {' '.join(str(error).split())[:200]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of the names of the files to mutate")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix="lopd-fuzz-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "memo")
    start = time.monotonic()
    try:
        findings = fuzz(root, args.count, args.seed, args.only)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(findings.table())
    print(f"{sum(findings.tried.values()):,} mutations in {time.monotonic() - start:.0f} s")
    for key, (count, target, example) in sorted(findings.failures.items()):
        print(f"{count:6} {target}: {key} {example}", file=sys.stderr)
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
