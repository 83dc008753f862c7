"""A training run and its output folder, for the stages that train.

The folder contains `recipe.json` from the start, `checkpoint-N` during training, then the model,
its tokenizer and `train_log.jsonl`, and last `manifest.json`, which marks the run as finished.
Calling a stage again continues the run from its last complete checkpoint and renames torn ones; a
checkpoint of another recipe and a finished run are refused.

With torchrun each process trains on its part of every step; only the first one writes the folder.
"""

import json
import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from lopd.config.device import resolve_device
from lopd.config.fields import identity_of
from lopd.config.objective import Objective
from lopd.config.training import PATIENCE_S, MonitoringOptions
from lopd.errors import ConfigError, DataError
from lopd.provenance import MANIFEST_NAME, ModelIdentity, difference, settings_identity
from lopd.provenance.io import (
    parse_json,
    pretty_json,
    sha256_file,
    write_atomic,
)
from lopd.provenance.manifest import RECIPE_NAME
from lopd.store.folders import examine_folder, locked
from lopd.store.locks import FolderLock
from lopd.store.workers import Worker, this_worker
from lopd.training.batch import Source
from lopd.training.checkpoints import last_checkpoint, put_aside, saving

LOG = logging.getLogger(__name__)


def begin(config: Any, *, base: ModelIdentity, **inputs: str | None) -> Path | None:
    """Claim `config.out` for this recipe.

    Args:
        config: settings of the stage.
        base: the model that training starts from.
        inputs: content digests of the run's other inputs.

    Returns:
        The checkpoint to continue from; None to start from the beginning.

    Raises:
        ConfigError: the folder contains a finished run, a checkpoint of another recipe or
            something else, or is a file.
        DataError: `recipe.json` is damaged.
        ShardError: another process trains there, or the folder cannot be written.
    """
    worker = this_worker(None)
    if worker.is_single and config.fsdp:
        raise ConfigError("fsdp: found one process; expected several to shard over; use torchrun")
    if worker.is_single:
        return _claim(config, base, inputs, worker)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    on_cpu = resolve_device(config.device).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=PATIENCE_S))
    claimed = [_claim(config, base, inputs, worker) if state.is_main_process else None]
    return broadcast_object_list(claimed)[0]


def is_first() -> bool:
    """Whether this process writes the run's folder."""
    return this_worker(None).index == 0


def _claim(
    config: Any, base: ModelIdentity, inputs: Mapping[str, str | None], worker: Worker
) -> Path | None:
    out = Path(config.out)
    names = ("weights", "config", "tokenizer", "behaviour", "eos_ids")
    start = {name: getattr(base, name) for name in names}
    processes = {} if worker.is_single else {"processes": worker.count}
    recipe = {**settings_identity(config), **inputs, **processes, "base": start}
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    checkpoint = last_checkpoint(out, keep_best=getattr(config, "keep_best", False))
    found = examine_folder(
        out,
        final=MANIFEST_NAME,
        record=RECIPE_NAME,
        differs=lambda: difference(recorded_recipe(out, config), recipe),
        has_results=lambda: checkpoint is not None,
        kind="checkpoint",
    ).require_writable()
    with locked(out), saving(out):
        if found.state == "new":  # otherwise it stays: checkpoints name its digest
            write_atomic(out / RECIPE_NAME, pretty_json(recipe))
    return checkpoint


def recorded_recipe(out: Path, config: Any) -> dict[str, Any]:
    """The recipe of the run in a folder; settings that an older version lacked by default."""
    return {**identity_of(config, {}), **read_recipe(out / RECIPE_NAME)}


def read_recipe(file: Path) -> dict[str, Any]:
    """The settings that a run recorded when it began; DataError if the file is damaged."""
    try:
        recipe = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: torn or altered ({error}); restore it, or remove the folder to begin again"
        ) from error
    if not isinstance(recipe, dict):
        raise DataError(f"{file}: holds no settings; restore it, or remove the folder")
    return recipe


def train(
    config: Any,
    source: Source,
    objective: Objective,
    *,
    model_path: str,
    checkpoint: Path | None,
    k: int = 0,
    refresh: Any = None,
) -> dict[str, Any]:
    """Train the model at `model_path`; the first process saves the result and its tokenizer.

    Args:
        config: settings of the stage.
        source: the sequences to train on.
        objective: what to minimise.
        model_path: folder of the model to start from.
        checkpoint: the checkpoint to continue from, if any.
        k: tokens in a teacher's list.
        refresh: a `Refresh`, for rollouts that are refreshed during training.

    Returns:
        Entries of the manifest: `training` with the number of sequences and the share dropped;
        with MonitoringOptions also `stale` and, if sequences were held out, `holdout`; with
        `refresh` those of `refresh_summary`.

    Raises:
        ConfigError: holding out sequences leaves nothing to train on or to evaluate.
        ShardError: another process trains there, the disk is full, or the best checkpoint is
            missing or torn.
    """
    from lopd.training.logging import own_tracker_run
    from lopd.training.memory import planned_peak
    from lopd.training.result import check_disk, export, rehearse, result_model
    from lopd.training.setup import build_trainer, warn_of_rounding

    first, out = is_first(), Path(config.out)
    lock = FolderLock(out) if first else None
    try:
        if first:
            warn_of_rounding(config)
        trainer, tokenizer, dropped = build_trainer(
            config, source, objective, model_path, refresh, _run_id(out)
        )
        if first:
            with saving(out):
                put_aside(out, checkpoint, keep_best=getattr(config, "keep_best", False))
            rehearse(out, trainer.model, tokenizer)
            check_disk(config, trainer)
            if trainer.args.device.type == "cuda" and refresh is None:
                trainer.meter.planned = planned_peak(config, trainer, model_path, k)
        trainer.accelerator.wait_for_everyone()
        with own_tracker_run(config.report_to):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        state = trainer.unsharded_state() if config.fsdp else None
        if first:
            model = result_model(config, trainer, model_path, state)
            export(out, model, tokenizer, adapters=bool(config.lora_rank))
        trainer.accelerator.wait_for_everyone()
    finally:
        if lock is not None:
            lock.release()
    summary = _summary(config, trainer, dropped, refresh)
    if first:
        for line in report(out, summary, trainer.objective):
            LOG.info(line)
    return summary


def report(out: Path, summary: Mapping[str, Any], objective: Objective) -> list[str]:
    """What a run prints at its end: held-out KL, staleness, and where the log is."""
    from lopd.training.holdout import sign
    from lopd.training.logging import LOG_NAME

    lines = []
    if holdout := summary.get("holdout"):
        bound = sign(objective.held_out)
        start, best, last = holdout["start"], holdout["best"], holdout["last"]
        first = "" if start is None else f"{bound}{start:.4g} at the start, "
        reached = best if holdout["result_step"] == best["step"] else last
        worse = "" if start is None or reached["kl"] < start else ", no better than the start"
        lines.append(
            f"{out}: held-out {holdout['objective']} {first}{bound}{best['kl']:.4g} at step "
            f"{best['step']} (best), {bound}{last['kl']:.4g} at step {last['step']} (last); the "
            f"result is that of step {holdout['result_step']}{worse}"
        )
    if lowest := summary.get("stale", {}).get("lowest"):
        lines.append(
            f"{out}: lowest share of tokens that count as samples of the student: "
            f"{lowest['ess']:.1%} at step {lowest['step']}"
        )
    return [*lines, f"{out}: log in {out / LOG_NAME}"]


def _run_id(out: Path) -> str:
    """The identity of the run in a folder, which its checkpoints repeat."""
    return sha256_file(out / RECIPE_NAME)


def _summary(config: Any, trainer: Any, dropped: float, refresh: Any) -> dict[str, Any]:
    """The manifest's entries about a finished training."""
    from lopd.training.holdout import holdout_summary
    from lopd.training.staleness import stale_summary

    history, sequences = trainer.state.log_history, len(trainer.train_dataset)
    summary: dict[str, Any] = {"training": {"sequences": sequences, "dropped_share": dropped}}
    if isinstance(config, MonitoringOptions):
        summary["stale"] = stale_summary(config.stale_ess, history)
    if trainer.holdout is not None:
        last = trainer.state.global_step
        summary["holdout"] = holdout_summary(trainer.holdout, history, last)
    if refresh is not None:
        from lopd.training.refresh_timing import refresh_summary

        summary |= refresh_summary(refresh.every, history)
    return summary
