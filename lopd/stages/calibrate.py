"""Calibrate a cache that another teacher scored (`lopd calibrate`).

`lopd.evaluation.calibration` says what is computed, for the records of each teacher by themselves.
The cache is read twice, shard by shard: for the means, then to write. The new cache has the
rollouts of the old one, no lists, and in `inputs.cache` the digest of the old one. An interrupted
run is continued with the missing shards, whose bytes do not depend on the interruption.
"""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.calibrate import CalibrateConfig
from lopd.errors import ConfigError
from lopd.evaluation.agreement import logprob_source
from lopd.evaluation.calibration import SURPRISALS, Calibration
from lopd.provenance import VOCAB_FILES, CacheManifest, build_manifest
from lopd.provenance.io import storing, write_atomic
from lopd.provenance.teachers import described
from lopd.stages.finished import say_finished
from lopd.stages.table import print_fields
from lopd.store import CacheWriter, Rollout, TeacherCache, TeacherScores, TeacherSequence
from lopd.training.metrics import POSITIONS


def main(config: CalibrateConfig) -> Path:
    """Write the calibrated cache, and print what it changes. Returns its folder.

    Raises:
        ConfigError: the cache is calibrated already, was renormalised, or lacks the log-probs of
            the policy that sampled it; its prompts are too few; `out` holds another recipe.
        ShardError: the cache is incomplete or altered, or another process writes to `out`.
        MissingFileError, DataError: `cache` is no cache, or its manifest is damaged.
    """
    cache = TeacherCache.open(config.cache, support="list")
    source = _check(config, cache.manifest)
    cache.verify()
    with CacheWriter.create(config.out, _manifest(config, cache)) as writer:
        if not (missing := writer.missing()):
            say_finished(config.out)
            writer.finish()
            return Path(config.out)
        calibrations = {
            name: Calibration(cache.manifest.vocab_size, config.folds, source)
            for name in cache.manifest.models
        }
        for sequence in cache:
            calibrations[sequence.teacher_id].add(sequence)
        for name, calibration in calibrations.items():
            if calibration.folds_used < 2:
                prompts = "its prompts" if name is None else f"prompts of '{name}'"
                raise ConfigError(
                    f"{config.cache}: all {prompts} are in one of {config.folds} folds, so there "
                    "are no others to take means over; calibrate a cache of more prompts"
                )
        _copy_vocabs(cache.path, Path(config.out))
        sequences = iter(cache)
        for shard, size in enumerate(cache.manifest.shards):
            # Those that are there are calibrated too, for the summary of the whole.
            records = [
                _record(sequence, calibrations[sequence.teacher_id])
                for sequence in islice(sequences, size)
            ]
            if shard in missing:
                writer.write(shard, records)
        writer.finish()
    for name, calibration in calibrations.items():
        whose = "" if name is None else f"{name}: "
        print_fields({f"{whose}{k}": v for k, v in calibration.summary.rows().items()})
    return Path(config.out)


def _check(config: CalibrateConfig, manifest: CacheManifest) -> str:
    """The column of log p_ref of a cache that can be calibrated."""
    scoring = manifest.scoring
    if scoring.is_calibrated:
        raise ConfigError(f"{config.cache}: is calibrated already; name the cache that it is of")
    if scoring.tail == "renormalized":
        raise ConfigError(
            f"{config.cache}: its lists were renormalised before they were imported, so the "
            "teacher's log-probs are lost; score the rollouts again"
        )
    source, reason = logprob_source(manifest)
    if source is None:
        raise ConfigError(
            f"{config.cache}: {reason}, and a calibration compares the teacher with the policy "
            "that sampled, at one temperature; roll out and score again"
        )
    return source


def _manifest(config: CalibrateConfig, cache: TeacherCache) -> CacheManifest:
    source = cache.manifest
    scoring = {
        "entropy": source.scoring.entropy,
        "rollout_logprobs": source.scoring.rollout_logprobs,
        "teacher_logprobs": "calibrated",
    }
    plan: dict[str, Any] = {"shards": source.shards}
    if source.teachers is not None:
        plan["teachers"] = source.shard_teachers
    return build_manifest(
        "cache",
        stage="calibrate",
        config=asdict(config),
        **described(source.models),
        inputs={
            **source.inputs,
            "cache": {"digest": cache.digest(), "path": str(cache.path)},
        },
        overrides=source.overrides,
        plan=plan,
        k=0,
        top_p=1.0,
        codec="exact",
        temperature=source.temperature,
        **({"declared": True} if source.declared else {}),
        scoring=scoring,
        calibration={
            "folds": config.folds,
            "positions": list(POSITIONS),
            "surprisals": list(SURPRISALS),
        },
    )


def _record(sequence: TeacherSequence, calibration: Calibration) -> tuple[Rollout, TeacherScores]:
    """A sequence with calibrated log-probs, an empty list, and the whole mass outside it."""
    rows = len(sequence.teacher_logprobs)
    return sequence.rollout, TeacherScores(
        teacher_logprobs=calibration.calibrated(sequence),
        teacher_entropy=sequence.teacher_entropy,
        topk_ids=np.zeros((rows, 0), np.int32),
        topk_logprobs=np.zeros((rows, 0), np.float32),
        tail_logprobs=np.zeros(rows, np.float32),
    )


def _copy_vocabs(source: Path, out: Path) -> None:
    """Copy the vocabularies of the teachers, if the cache has them."""
    for file in source.glob(VOCAB_FILES):
        with storing(out / file.name):
            write_atomic(out / file.name, file.read_bytes())
