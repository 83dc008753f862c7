"""Every pair of training flags yields a model: a covering array of short runs."""

import functools
import itertools
import json
import math
import random

import pytest
from helpers_artefacts import trained_weights
from helpers_training import largest_difference

from lopd.errors import ConfigError
from lopd.provenance.folder_receipt import check_receipt
from lopd.stages import distill

pytestmark = pytest.mark.thorough

BASE = {"batch_size": 2, "learning_rate": 1e-3, "max_steps": 2, "device": "cpu", "log_every": 1}
# For each group of flags: the settings that are tried, the defaults among them.
LEVELS = {
    "objective": (
        {},
        {"objective": "forward_kl", "tail": "truncate"},
        {"objective": "jsd", "beta": 0.3},
        {"objective": "policy_gradient", "advantage_clip": 1.0},
        {"objective": "policy_gradient", "importance": "sequence", "importance_cap": 2.0},
        {"objective": "policy_gradient", "clip_range": 0.2},
        {"tail": "renormalize", "support": "list"},
    ),
    "adapters": ({}, {"lora_rank": 4}, {"lora_rank": 2, "lora_targets": "q_proj,v_proj"}),
    "precision": ({}, {"mixed_precision": "bf16"}, {"dtype": "bfloat16"}),
    "batches": (
        {},
        {"max_tokens_per_batch": 40},
        {"max_tokens_per_batch": 40, "attention": "sdpa"},
        {"gradient_accumulation_steps": 3},
    ),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "optimizer": ({}, {"optim": "adafactor"}, {"optim": "sgd"}),
    "clipping": ({}, {"max_grad_norm": 0.0}),
    "decay": ({}, {"weight_decay": 0.0, "adam_beta2": 0.95}),
    "schedule": (
        {},
        {"lr_scheduler_type": "cosine_with_min_lr", "min_lr_ratio": 0.1, "warmup_steps": 1},
        {"lr_scheduler_type": "linear"},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1},
    ),
    "aggregation": ({}, {"loss_aggregation": "sequence_mean"}),
    "truncated": ({}, {"drop_truncated": True}),
    "holdout": (
        {},
        {"holdout": 3, "eval_steps": 1},
        {"holdout": 0.3, "eval_steps": 1, "keep_best": True},
        {"holdout": 3, "eval_steps": 1, "patience": 1},
    ),
    "saving": ({}, {"save_every": 1, "save_total_limit": 1}, {"save_every": 0}),
    "staleness": ({}, {"stale_ess": 0.0}),
    "workspace": ({}, {"workspace_bytes": "64MiB"}),
    "left_out": ({}, {"dense_share": 0.3}, {"tolerance": 0.01}),
    "refresh": ({}, {"refresh_every": 1}),
}


def settings_of(row, paths):
    settings = dict(BASE, **{name: paths[name] for name in ("student", "cache", "out")})
    for name, level in row.items():
        settings |= LEVELS[name][level]
    if "refresh_every" in settings:
        settings["teacher"] = paths["teacher"]
    return distill.DistillConfig(**settings)


@functools.cache
def fit(*pair):
    """Whether the config accepts two levels, with defaults for the rest."""
    try:
        settings_of(dict(pair), dict.fromkeys(("student", "cache", "out", "teacher"), "x"))
    except ConfigError:
        return False
    return True


def covering_array(seed=0):
    """Rows in which every pair of levels occurs that the config does not refuse."""
    rng = random.Random(seed)
    levels = [(name, level) for name in sorted(LEVELS) for level in range(len(LEVELS[name]))]
    pairs = (p for p in itertools.combinations(levels, 2) if p[0][0] != p[1][0])
    missing = {pair for pair in pairs if fit(*pair)}
    rows = []
    while missing:
        row = dict(min(missing))
        for name in rng.sample(sorted(LEVELS), len(LEVELS)):
            if name not in row:
                row[name] = best_level(name, row, missing)
        covered = {*itertools.combinations(sorted(row.items()), 2)}
        assert covered & missing and all(fit(*pair) for pair in covered)
        missing -= covered
        rows.append(row)
    return rows


def best_level(name, row, missing):
    """The level that fits the row and covers most missing pairs."""

    def pairs(level):
        return [tuple(sorted([(name, level), chosen])) for chosen in row.items()]

    allowed = [level for level in range(len(LEVELS[name])) if all(fit(*p) for p in pairs(level))]
    return max(allowed, key=lambda level: sum(pair in missing for pair in pairs(level)))


ROWS = covering_array()
IN_CI = 6


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * (i >= IN_CI)) for i, row in enumerate(ROWS)],
    ids=range(len(ROWS)),
)
def test_every_pair_of_flags_yields_a_model(pipeline, tmp_path, row):
    paths = {name: str(pipeline / name) for name in ("student", "cache", "teacher")}
    config = settings_of(row, {**paths, "out": str(tmp_path / "out")})
    out = distill.main(config)
    check_receipt(out)
    start, end = (trained_weights(folder) for folder in (pipeline / "student", out))
    if not config.keep_best:  # the best step may be one of the warm-up, with a rate of 0
        assert largest_difference(start, end) > 0.0
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses and all(map(math.isfinite, losses))
