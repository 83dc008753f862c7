"""Is an artefact what it says, and is its signal above its noise? (`lopd verify`)

Alone: receipts, hashes, ranges and provenance of any artefact folder, from files.

With `--rescore N`: the teacher scores N sequences of a cache again, perhaps with another
engine, dtype or batch size. KL(again || stored), over the stored list and its tail, is the
loss that a perfect student would still have: the noise floor. KL(student || stored) on the
same tokens and buckets is the signal. Names can agree while numerics do not.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lopd.config.fields import setting
from lopd.engines.options import EngineOptions, ScoringOptions
from lopd.errors import ConfigError, DataError, NoiseError, ProvenanceError
from lopd.evaluation.noise_floor import measure_noise
from lopd.provenance import (
    VOCAB_NAME,
    CacheManifest,
    Manifest,
    ModelIdentity,
    config_digest,
    fingerprint_weights,
    load_vocab,
    read_manifest,
    tokenizer_digest,
)
from lopd.provenance.io import json_digest
from lopd.store import RolloutStore, TeacherCache, TeacherSequence
from lopd.store.validate import MASS_TOLERANCE, check_rollout, check_scored_sequence

LOSSY_MASS_TOLERANCE = 5e-3  # list and tail, where log-probs were quantised

_evaluation = partial(setting, group="Evaluation")


@dataclass(kw_only=True)
class VerifyConfig(EngineOptions, ScoringOptions):
    """Check an artefact folder, and with --rescore a cache's noise floor (`lopd verify`)."""

    path: str = setting(help="Folder of answers, rollouts, a cache, a checkpoint or an evaluation.")
    rescore: int = _evaluation(
        0, within="[0, inf)", help="Score N sequences of a cache again; 0 checks files only."
    )
    teacher: str | None = _evaluation(None, help="Folder of the teacher that scored the cache.")
    student: str | None = _evaluation(
        None, help="Folder of the student; its KL on the same tokens is the signal."
    )
    max_noise_share: float = _evaluation(
        0.1, within="(0, inf)", help="Fail if noise / signal is above this."
    )
    seed: int = _evaluation(0, within="[0, 4294967296)", help="Seed for choosing the sequences.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescore and (self.teacher is None or self.student is None):
            raise ConfigError("rescore: needs --teacher and --student, both model folders")
        if not self.rescore and (self.teacher or self.student):
            raise ConfigError("teacher, student: --teacher and --student require --rescore N")


def main(config: VerifyConfig) -> None:
    """Print what was checked.

    Raises:
        LopdError: the first thing that is not as it should be.
        NoiseError: the noise floor is above the set share of the signal.
    """
    manifest = read_manifest(config.path)
    if config.rescore and manifest.kind != "cache":
        raise ConfigError(f"{config.path}: holds '{manifest.kind}'; only a cache is rescored")
    rows = {"kind": manifest.kind, **check_artefact(Path(config.path), manifest)}
    _print(rows)
    if config.rescore:
        assert config.teacher is not None and config.student is not None
        noise = measure_noise(
            config.path,
            config.rescore,
            teacher=config.teacher,
            student=config.student,
            options=config,
            tokens_per_batch=config.tokens_per_batch,
            seed=config.seed,
        )
        how = f"{config.engine}, {config.dtype}, tokens_per_batch {config.tokens_per_batch}"
        _print({"again with": how, **noise.rows()})
        if not noise.share <= config.max_noise_share:
            raise NoiseError(
                f"{config.path}: the noise floor is {noise.share:.3g} of the signal, expected at "
                f"most {config.max_noise_share}; score in a wider --dtype or with the engine that "
                "will be trusted, or allow more with --max_noise_share"
            )


def check_artefact(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Check what files can tell; returns what was found, in words.

    Raises:
        ShardError: an unfinished, truncated or altered shard. DataError: contents out of range.
        ProvenanceError: the folder does not hold what its manifest describes.
    """
    kind = manifest.kind
    if kind == "checkpoint":
        rows = _check_checkpoint(folder, manifest)
    elif kind == "evaluation":
        rows = _check_evaluation(folder)
    else:
        rows = _check_store(folder, manifest)
    if kind != "checkpoint":
        rows["model"] = _whereabouts(manifest.model)
    if manifest.base is not None:
        rows["base"] = _whereabouts(manifest.base)
    return rows


def _check_checkpoint(folder: Path, manifest: Manifest) -> dict[str, str]:
    found = {
        "weights": fingerprint_weights(folder, rehash=True),
        "config": config_digest(folder),
        "tokenizer": tokenizer_digest(folder),
    }
    for what, digest in found.items():
        expected = getattr(manifest.model, what)
        if expected is not None and digest != expected:
            raise ProvenanceError(
                f"{folder}: its {what} ({digest[:12]}) are not those that its manifest describes "
                f"({expected[:12]}); restore them, or make the checkpoint again"
            )
    return {"model": "weights, config and tokenizer are those of the manifest"}


def _check_evaluation(folder: Path) -> dict[str, str]:
    file = folder / "results.json"
    try:
        results = json.loads(file.read_bytes())
        lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        answers = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: torn or altered ({error}); evaluate again") from error
    expected = results["prompts"] * (1 + results["samples"])
    if len(answers) != expected:
        raise DataError(f"{folder}: holds {len(answers)} answers, expected {expected}")
    return {"answers": f"{len(answers)}, as many as the results count"}


def _check_store(folder: Path, manifest: Manifest) -> dict[str, str]:
    store: RolloutStore | TeacherCache
    tolerance = 0.0
    if isinstance(manifest, CacheManifest):
        store = TeacherCache.open(folder, support="list")
        tolerance = MASS_TOLERANCE if manifest.codec == "exact" else LOSSY_MASS_TOLERANCE
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
            check_scored_sequence(item, tolerance)
    if len(names) != len(store):
        raise DataError(f"{folder}: {len(store) - len(names)} sequences are there twice")
    return {
        "shards": f"{store.num_shards}, every one as its receipt says",
        "sequences": f"{len(store)}, all in range",
        "vocabulary": _check_vocabulary(folder, manifest),
    }


def _check_vocabulary(folder: Path, manifest: Manifest) -> str:
    if not (folder / VOCAB_NAME).exists():
        return "none stored beside it"
    if json_digest(load_vocab(folder)) != manifest.model.tokenizer:
        raise ProvenanceError(
            f"{folder / VOCAB_NAME}: is not the tokenizer that the manifest describes; run the "
            "stage again to write it"
        )
    return "the tokenizer that the manifest describes"


def _whereabouts(model: ModelIdentity) -> str:
    """Whether the model that a manifest names is still where it was; a note, not a check."""
    path, weights = model.path, model.weights
    if not path or not Path(path).is_dir():
        state = "not there now"
    elif fingerprint_weights(path) == weights:
        state = "there, unchanged"
    else:
        state = "other weights there now"
    return f"{path} (weights {weights[:12]}, {state})"


def _print(rows: dict[str, str]) -> None:
    for name, value in rows.items():
        print(f"{name:<12}  {value}")
