"""What the folders of a run and of an evaluation hold, as a report needs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lopd.config.fields import MOST
from lopd.errors import ConfigError, DataError
from lopd.evaluation.results import read_results
from lopd.provenance import MANIFEST_NAME, ModelIdentity, read_manifest
from lopd.provenance.io import parse_json
from lopd.provenance.typed_json import parse, value_at
from lopd.training.logging import LOG_NAME

# column of the log: (title, unit)
CURVES = {
    "loss": ("Objective", "nat per token"),
    "holdout_kl": ("Divergence on held-out sequences", "nat per token"),
    "student_tail": ("Student's mass outside the lists", "share"),
    "teacher_tail": ("Teacher's mass outside the lists", "share"),
    "topk_overlap": ("Overlap of the two top-k lists", "share"),
    "student_entropy": ("Student's entropy", "nat"),
    "share_dense": ("Tokens whose gradient outside the lists was formed", "share"),
    "ess_tokens": ("Tokens that still count as the student's own (ESS)", "share"),
    "kept_share": ("Weight of the tokens that --token-weights kept", "share"),
    "ess_weights": ("Effective share of the weighted tokens", "share"),
    "share_forward": ("Tokens that took the forward KL", "share"),
    "grad_norm": ("Norm of the gradient", ""),
    "learning_rate": ("Learning rate", ""),
    "tokens_per_second": ("Speed", "tokens per second"),
    "peak_mib": ("Peak memory, and that of the plan", "MiB"),
}
# Beginnings of the columns of one of several teachers, whose name follows.
OF_TEACHER = {
    "divergence/": "Divergence on the records of {}",
    "holdout_kl/": "Divergence on held-out sequences of {}",
}
PLANNED = "planned_mib"  # drawn beside the peak


@dataclass(frozen=True, kw_only=True)
class _Best:
    """The best evaluation of held-out sequences."""

    kl: float
    step: int


@dataclass(frozen=True, kw_only=True)
class _Reports:
    """What is read of the entries for people in a manifest."""

    environment: Mapping[str, Any] | None = None
    best: _Best | None = field(default=None, metadata={"at": "holdout.best"})
    start: float | None = field(default=None, metadata={"at": "holdout.start"})


@dataclass(frozen=True)
class Run:
    """A folder that `lopd distill` or `lopd sft` wrote."""

    name: str
    folder: str
    stage: str
    weights: str
    vocab_size: int | None  # rows of the model's head; None in runs of earlier versions
    base: str | None  # weights of the student that it began from
    created: str
    cache: str | None
    cache_digest: str | None
    steps: list[tuple[str, str]]  # the pipeline: (role, what it was)
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    reports: Mapping[str, Any]  # holdout, stale, training, objective
    curves: dict[str, list[tuple[int, float]]]  # column -> (step, value)


@dataclass(frozen=True)
class Evaluation:
    """A folder that `lopd eval` wrote."""

    folder: str
    weights: str
    results: Mapping[str, Any]


def read_run(folder: str) -> Run:
    """The run in a folder.

    Raises:
        ConfigError: the folder holds no result of training.
        DataError: the log is damaged.
    """
    path = Path(folder)
    if not (path / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{folder}: no {MANIFEST_NAME}; expected the folder of a finished run of lopd distill "
            "or lopd sft (rerun the command to finish it)"
        )
    manifest = read_manifest(path)
    if manifest.kind != "checkpoint" or not (path / LOG_NAME).is_file():
        raise ConfigError(
            f"{folder}: holds '{manifest.kind}' of {manifest.stage} without a training log; "
            "expected the folder of a run of lopd distill or lopd sft"
        )
    raw = manifest.raw
    parse(_Reports, raw, "", lambda name: _altered(path / MANIFEST_NAME, f"no valid {name}"))
    cache = manifest.config.get("cache")
    return Run(
        name=path.resolve().name,
        folder=folder,
        stage=manifest.stage,
        weights=manifest.model.weights,
        vocab_size=manifest.model.vocab_size,
        base=None if manifest.base is None else manifest.base.weights,
        created=str(raw.get("created", "unknown")),
        cache=None if cache is None else str(cache),
        cache_digest=value_at(manifest.inputs, "cache.digest"),
        steps=_pipeline(manifest),
        settings=manifest.config,
        environment=raw.get("environment") or {},
        reports={k: raw[k] for k in ("objective", "holdout", "stale", "training") if k in raw},
        curves=_curves(path / LOG_NAME),
    )


def _pipeline(manifest: Any) -> list[tuple[str, str]]:
    steps = []
    lineage = manifest.lineage
    if lineage is not None and lineage.sft_teacher is not None:
        said = " (declared)" if lineage.declared else ""
        taught = lineage.sft_teachers or {None: lineage.sft_teacher}
        for name, model in taught.items():
            role = "teacher of the fine-tuning" + ("" if name is None else f" on {name}")
            steps.append((role + said, _model(model)))
    if manifest.base is not None:
        steps.append(("student before", _model(manifest.base)))
    for name, value in manifest.inputs.items():
        if not isinstance(value, Mapping):
            continue
        if isinstance(value.get("teachers"), Mapping):
            for teacher, each in value["teachers"].items():
                model = _model(ModelIdentity.from_json(each))
                steps.append((f"{name}, records of {teacher} scored by", model))
        elif isinstance(value.get("model"), Mapping):
            steps.append((f"{name}, scored by", _model(ModelIdentity.from_json(value["model"]))))
        elif "digest" in value or "sha256" in value:
            steps.append((name, str(value.get("digest") or value["sha256"])[:12]))
    steps.append(("result", _model(manifest.model)))
    return steps


def _model(model: ModelIdentity) -> str:
    return f"{model.hub or model.path or 'a model'} ({model.weights[:12]})"


def _altered(where: object, what: str) -> DataError:
    return DataError(f"{where}: {what}: torn or altered; restore it, or leave the run out")


def _curves(log: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(log.read_bytes().splitlines(), 1):
        step, record = _record(line, f"{log}:{number}")
        for name, value in record.items():
            drawn = name in (*CURVES, PLANNED) or name.startswith(tuple(OF_TEACHER))
            if drawn and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(name, []).append((step, float(value)))
    return curves


def curves_of(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Title and unit of the curves of some runs by column; those of named teachers come last."""
    columns = sorted({column for run in runs for column in run.curves})
    named = {
        column: (title.format(column.removeprefix(start)), "nat per token")
        for start, title in OF_TEACHER.items()
        for column in columns
        if column.startswith(start)
    }
    return CURVES | named


def _record(line: bytes, where: str) -> tuple[int, dict[str, Any]]:
    """The step and the metrics of one line of a log."""
    try:
        record = parse_json(line)
        step = record["step"]
        if type(step) is not int or not 0 <= step <= MOST:
            raise ValueError(f"step {step!r}")
        if any(type(value) is int and abs(value) > MOST for value in record.values()):
            raise ValueError("a number beyond 2^53")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _altered(where, str(error) or type(error).__name__) from error
    return step, record


def read_evaluation(folder: str) -> Evaluation:
    """The evaluation in a folder.

    Raises:
        ConfigError: the folder holds none.
        DataError: its results are torn, or altered.
    """
    path = Path(folder)
    if not (path / MANIFEST_NAME).is_file() or read_manifest(path).kind != "evaluation":
        raise ConfigError(f"{folder}: expected a folder that lopd eval wrote")
    return Evaluation(folder, read_manifest(path).model.weights, read_results(path))
