"""Fine-tune the student on the teacher's answers (`lopd sft`).

The result's manifest names that teacher by the digest of its weights: `lopd distill` wants
the rollouts to be scored by the same one.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lopd.config.fields import setting
from lopd.data.demonstrations import load_sft_jsonl
from lopd.errors import MissingFileError, ProvenanceError
from lopd.models.load import check_model_folder, load_tokenizer
from lopd.provenance import (
    build_manifest,
    describe_file,
    describe_model,
    differing_token,
    load_vocab,
    tokenizer_digest,
    write_manifest,
)
from lopd.store import RolloutStore
from lopd.training import run as runs
from lopd.training.batch import Source
from lopd.training.objective import Objective
from lopd.training.options import TrainOptions

TEACHER_KEYS = ("weights", "tokenizer", "path")


@dataclass(kw_only=True)
class SftConfig(TrainOptions):
    """Fine-tune a model on answers (`lopd sft`)."""

    model: str = setting(identity=False, help="Folder of the model to start from.")
    data: str = setting(
        identity=False, help="Folder that `lopd sft-data` wrote, or JSONL of prompt and completion."
    )
    out: str = setting(identity=False, help="Folder to write; an interrupted run is continued.")


def main(config: SftConfig) -> Path:
    """Train, save, and write the manifest last. Returns the model's folder.

    Raises:
        ProvenanceError: the answers were sampled with another tokenizer.
        ConfigError: `out` holds a finished run or another recipe.
        MissingFileError, DataError, ModelError: model or data that cannot be used.
    """
    check_model_folder(config.model)
    base = describe_model(config.model, dtype=config.dtype, engine="transformers")
    source, inputs, teacher = open_data(config.data, config.model)
    checkpoint = runs.begin(config, data=_digest(inputs), base=base)
    objective = Objective("cross_entropy", workspace_bytes=config.workspace)
    trained = runs.train(config, source, objective, model_path=config.model, checkpoint=checkpoint)
    if not runs.is_first():
        return Path(config.out)
    manifest = build_manifest(
        "checkpoint",
        stage="sft",
        config=asdict(config),
        model=describe_model(config.out, dtype=config.dtype, engine="transformers"),
        base=base,
        inputs=inputs,
        lineage={"sft_teacher": teacher, "declared": False, "initial_student": None},
        **trained,
    )
    write_manifest(config.out, manifest)
    return Path(config.out)


def open_data(data: str, model: str) -> tuple[Source, dict[str, Any], dict[str, Any] | None]:
    """Sequences, what the manifest says of them, and the teacher that made them, if known."""
    tokenizer = load_tokenizer(model)
    if Path(data).is_file():
        return load_sft_jsonl(data, tokenizer), {"demonstrations": describe_file(data)}, None
    store = RolloutStore.open(data, kind="sft_data")
    if runs.is_first():  # the others wait for it where the run begins
        store.verify()
    teacher = store.manifest["model"]
    check_tokenizer(store, tokenizer, model)
    inputs = {"sft_data": {"digest": store.digest(), "model": teacher}}
    return store, inputs, {key: teacher[key] for key in TEACHER_KEYS}


def check_tokenizer(store: RolloutStore, tokenizer: Any, model: str) -> None:
    """Refuse answers in which an id means another token to the student than to the teacher.

    Raises:
        ProvenanceError: such an id, or tokenizers that differ and no copy of the teacher's
            vocabulary beside the answers to compare them by.
    """
    if tokenizer_digest(model) == store.manifest["model"]["tokenizer"]:
        return
    remedy = "fine-tune a model with the teacher's tokenizer"
    try:
        theirs = load_vocab(store.path)
    except MissingFileError:
        raise ProvenanceError(
            f"{store.path}: its answers were sampled with another tokenizer than that of {model}, "
            f"and the folder has no copy of it to compare ids by; {remedy}"
        ) from None
    if found := differing_token(tokenizer.get_vocab(), theirs, store.used_ids()):
        index, ours, other = found
        raise ProvenanceError(
            f"{store.path}: id {index} is {other!r} to the teacher and {ours!r} to {model}; "
            f"{remedy}"
        )


def _digest(inputs: dict[str, Any]) -> str:
    (described,) = inputs.values()
    return described["digest"] if "digest" in described else described["sha256"]
