"""Check an artefact folder and, on demand, a cache's noise floor (`lopd verify`).

Without options: receipts, hashes, value ranges and provenance, from files only.

With `--rescore N`: the teacher scores N sequences of a cache again, perhaps with another
engine, dtype or batch size, and the noise floor is compared with the student's signal (see
`lopd.evaluation.noise_floor`). This finds numerical differences that fingerprints cannot.
"""

from dataclasses import replace
from pathlib import Path

from lopd.config.dtype import AUTO, with_dtype
from lopd.config.inference import DTYPES
from lopd.config.verify import VerifyConfig
from lopd.errors import ConfigError, DataError, NoiseError, ProvenanceError
from lopd.evaluation.noise_floor import NoiseFloor, measure_noise_floor, scorers_of
from lopd.provenance import (
    CacheManifest,
    Manifest,
    ModelIdentity,
    behaviour_of,
    config_digest,
    difference,
    fingerprint_weights,
    load_vocab,
    read_manifest,
    tokenizer_digest,
    vocab_file,
)
from lopd.provenance.folder_receipt import RECEIPT_NAME, check_receipt
from lopd.provenance.io import json_digest, parse_json
from lopd.provenance.manifest import check_digest
from lopd.stages.model_access import loads_models
from lopd.stages.privileged import view_of_cache
from lopd.stages.table import print_fields
from lopd.store import RolloutStore, TeacherCache, TeacherSequence
from lopd.store.validate import (
    check_rollout,
    check_scored_sequence,
)


@loads_models
def main(config: VerifyConfig) -> None:
    """Check the folder and print what was checked.

    Raises:
        LopdError: the first check that fails.
        NoiseError: the noise exceeds `max_noise_share` of the signal.
    """
    manifest = read_manifest(config.path)
    if config.rescore and manifest.kind != "cache":
        raise ConfigError(f"{config.path}: holds '{manifest.kind}'; --rescore requires a cache")
    print_fields({"kind": manifest.kind, **check_artefact(Path(config.path), manifest)})
    if config.rescore:
        if config.dtype == AUTO and manifest.model.dtype in DTYPES:
            config = replace(config, dtype=manifest.model.dtype)  # the cache's own
        config = with_dtype(config)
        assert config.teacher is not None and config.student is not None
        cache = TeacherCache.open(config.path, support="list")
        tokenizer = cache.manifest.rollouts.model.path
        if tokenizer is None or not Path(tokenizer).is_dir():
            tokenizer = config.student
        teachers = scorers_of(config.path, config.teacher, cache.manifest)
        view = view_of_cache(cache, teachers, tokenizer, "--rescore")
        floor = measure_noise_floor(
            config.path,
            config.rescore,
            teachers=teachers,
            student=config.student,
            options=config,
            tokens_per_batch=config.tokens_per_batch,
            seen_by_teacher=view.of,
            seed=config.seed,
        )
        settings = f"{config.engine}, {config.dtype}, tokens_per_batch {config.tokens_per_batch}"
        print_fields({"rescored with": settings, **_describe_noise(floor)})
        if not floor.noise_share <= config.max_noise_share:
            raise NoiseError(
                f"{config.path}: the noise floor is {floor.noise_share:.3g} of the signal; "
                f"expected at most {config.max_noise_share}; score with a wider --dtype or with "
                "the engine that you trust, or raise --max-noise-share"
            )


def _describe_noise(floor: NoiseFloor) -> dict[str, str]:
    student = "" if floor.same_student else " (not the model that made the rollouts)"
    return {
        "rescored": f"{floor.sequences} sequences, {floor.tokens} tokens with loss",
        "buckets": f"{100 * floor.coverage:.1f} % of the listed ids, and one for all others",
        "log-prob": f"differs by {floor.mean_gap:.3g} on average, by {floor.largest_gap:.3g} at "
        "most",
        "teacher": f"{floor.noise:.4g} nat/token, KL(rescored || stored)",
        "student": f"{floor.signal:.4g} nat/token, KL(student || stored){student}",
        "noise share": f"{floor.noise_share:.3g}",
    }


def check_artefact(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Check a folder by its files, without loading a model.

    Returns:
        What was checked, as fields to print.

    Raises:
        ShardError: a shard is unfinished, truncated or altered.
        DataError: the manifest was altered, a value is out of range, or answers are missing.
        ProvenanceError: the contents do not match the manifest.
    """
    check_digest(manifest, folder)
    kind = manifest.kind
    if kind == "checkpoint":
        rows = _check_checkpoint(folder, manifest)
    elif kind == "evaluation":
        rows = _check_evaluation(folder)
    else:
        rows = _check_store(folder, manifest)
    if kind != "checkpoint":
        for name, model in manifest.models.items():
            rows["model" if name is None else f"teacher {name}"] = _describe_source(model)
    if manifest.base is not None:
        rows["base"] = _describe_source(manifest.base)
    return rows


def _check_checkpoint(folder: Path, manifest: Manifest) -> dict[str, str]:
    recorded = manifest.model.behaviour
    if recorded is not None and (changed := difference(recorded, behaviour_of(folder))):
        raise ProvenanceError(
            f"{folder}: {changed} since its manifest was written; restore the files, or make the "
            "checkpoint again"
        )
    digests = {
        "weights": fingerprint_weights(folder, rehash=True),
        "config": config_digest(folder),
        "tokenizer": tokenizer_digest(folder),
    }
    for what, digest in digests.items():
        expected = getattr(manifest.model, what)
        if expected is not None and digest != expected:
            raise ProvenanceError(
                f"{folder}: found {what} {digest[:12]}, the manifest describes {expected[:12]}; "
                "restore the files, or make the checkpoint again"
            )
    return {"model": "weights, config and tokenizer match the manifest", **_check_files(folder)}


def _check_evaluation(folder: Path) -> dict[str, str]:
    rows = _check_files(folder)
    file = folder / "results.json"
    try:
        results = parse_json(file.read_bytes(), finite=False)
        lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [parse_json(line, finite=False) for line in lines]
        expected = results["prompts"] * (1 + results["samples"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{folder}: torn or altered ({error}); run 'lopd eval' again") from error
    if len(answers) != expected:
        raise DataError(f"{folder}: found {len(answers)} answers; expected {expected}")
    return {"answers": f"{len(answers)}, as the results say", **rows}


def _check_files(folder: Path) -> dict[str, str]:
    """Compare the files of a result with its receipt; those of earlier versions have none."""
    if not (folder / RECEIPT_NAME).exists():
        return {}
    return {"files": f"{len(check_receipt(folder)['files'])}, all match the receipt"}


def _check_store(folder: Path, manifest: Manifest) -> dict[str, str]:
    store: RolloutStore | TeacherCache
    if isinstance(manifest, CacheManifest):
        store = TeacherCache.open(folder, support="list")
    else:
        store = RolloutStore.open(folder, kind=manifest.kind)
    store.verify()
    rows, has_logprobs = manifest.vocab_size, manifest.scoring.rollout_logprobs != "absent"
    names = set()
    for item in store:
        rollout = item.rollout if isinstance(item, TeacherSequence) else item
        check_rollout(rollout, rows, has_logprobs=has_logprobs)
        names.add((rollout.prompt_id, rollout.sample))
        if isinstance(item, TeacherSequence):
            assert isinstance(manifest, CacheManifest)
            calibrated = manifest.scoring.is_calibrated
            check_scored_sequence(item, manifest.codec, calibrated=calibrated)
    if len(names) != len(store):
        raise DataError(f"{folder}: {len(store) - len(names)} sequences occur twice")
    return {
        "shards": f"{store.num_shards}, all match their receipts",
        "sequences": f"{len(store)}, all in range",
        "vocabulary": _check_vocabulary(folder, manifest),
    }


def _check_vocabulary(folder: Path, manifest: Manifest) -> str:
    for model in manifest.models.values():
        file = vocab_file(folder, model.tokenizer)
        if not file.exists():
            return "not stored"
        if json_digest(load_vocab(folder, model.tokenizer)) != model.tokenizer:
            raise ProvenanceError(
                f"{file}: is not the tokenizer that the manifest describes; restore the file"
            )
    return "matches the manifest"


def _describe_source(model: ModelIdentity) -> str:
    """The path of a model in the manifest, and whether its weights are unchanged."""
    path, weights = model.path, model.weights
    if not path or not Path(path).is_dir():
        state = "no longer there"
    elif fingerprint_weights(path) == weights:
        state = "unchanged"
    else:
        state = "its weights have changed"
    return f"{path} (weights {weights[:12]}, {state})"
