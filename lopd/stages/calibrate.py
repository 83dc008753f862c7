"""Calibrate a cache that another teacher scored (`lopd calibrate`).

`lopd.evaluation.calibration` says what is computed. The cache is read twice, shard by shard: for
the means, then to write. The new cache has the rollouts of the old one, no lists, and in
`inputs.cache` the digest of the old one. An interrupted run is continued with the missing shards,
whose bytes do not depend on the interruption.
"""

from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from lopd.config.calibrate import CalibrateConfig
from lopd.errors import ConfigError
from lopd.evaluation.agreement import logprob_source
from lopd.evaluation.calibration import SURPRISALS, Calibration
from lopd.provenance import VOCAB_NAME, CacheManifest, build_manifest
from lopd.provenance.io import storing, write_atomic
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
        calibration = Calibration(cache.manifest.vocab_size, config.folds, source)
        for sequence in cache:
            calibration.add(sequence)
        if calibration.folds_used < 2:
            raise ConfigError(
                f"{config.cache}: all its prompts are in one of {config.folds} folds, so there are "
                "no others to take means over; calibrate a cache of more prompts"
            )
        _copy_vocab(cache.path, Path(config.out))
        sequences = iter(cache)
        for shard, size in enumerate(cache.manifest.shards):
            # Those that are there are calibrated too, for the summary of the whole.
            records = [_record(sequence, calibration) for sequence in islice(sequences, size)]
            if shard in missing:
                writer.write(shard, records)
        writer.finish()
    print_fields(calibration.summary.rows())
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
    if manifest.teachers is not None:
        raise ConfigError(
            f"{config.cache}: was scored by {len(manifest.teachers)} teachers, each of which "
            "differs from another in its own way; expected one: score each one's records separately"
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
    return build_manifest(
        "cache",
        stage="calibrate",
        config=asdict(config),
        model=source.model,
        inputs={
            **source.inputs,
            "cache": {"digest": cache.digest(), "path": str(cache.path)},
        },
        overrides=source.overrides,
        plan={"shards": source.shards},
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


def _copy_vocab(source: Path, out: Path) -> None:
    """Copy the teacher's vocabulary, if the cache has one."""
    if (file := source / VOCAB_NAME).is_file():
        with storing(out / VOCAB_NAME):
            write_atomic(out / VOCAB_NAME, file.read_bytes())
