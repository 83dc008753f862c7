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
    digests_of,
    load_vocab,
    tokenizer_digest,
    write_manifest,
)
from lopd.store import RolloutStore
from lopd.training import run as runs
from lopd.training.batch import Source
from lopd.training.objective import Objective
from lopd.training.options import TrainOptions


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
    source, teacher = open_data(config.data, config.model)
    inputs = describe_inputs(config)
    (data,) = digests_of(inputs).values()
    checkpoint = runs.begin(config, data=data, base=base)
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


def describe_inputs(config: SftConfig) -> dict[str, Any]:
    """The data that is trained on, for the manifest."""
    if Path(config.data).is_file():
        return {"demonstrations": describe_file(config.data)}
    store = RolloutStore.open(config.data, kind="sft_data")
    return {"sft_data": {"digest": store.digest(), "model": store.manifest.model}}


def open_data(data: str, model: str) -> tuple[Source, dict[str, Any] | None]:
    """The sequences, and the teacher that made them, if known."""
    tokenizer = load_tokenizer(model)
    if Path(data).is_file():
        return load_sft_jsonl(data, tokenizer), None
    store = RolloutStore.open(data, kind="sft_data")
    if runs.is_first():  # the others wait for it where the run begins
        store.verify()
    check_tokenizer(store, tokenizer, model)
    return store, store.manifest.model.as_teacher()


def check_tokenizer(store: RolloutStore, tokenizer: Any, model: str) -> None:
    """Refuse answers in which an id means another token to the student than to the teacher.

    Raises:
        ProvenanceError: such an id, or tokenizers that differ and no copy of the teacher's
            vocabulary beside the answers to compare them by.
    """
    if tokenizer_digest(model) == store.manifest.model.tokenizer:
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
