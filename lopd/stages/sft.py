"""Fine-tune the student on the teacher's answers (`lopd sft`).

The manifest of the checkpoint records the teacher's fingerprint, so that `lopd distill` can
check that the same teacher scored the rollouts.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopd.config.objective import Objective
from lopd.config.sft import SftConfig
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


def main(config: SftConfig) -> Path:
    """Train, save the model and, last, its manifest. Returns the model's folder.

    Raises:
        ProvenanceError: the answers were sampled with another tokenizer.
        ConfigError: `out` holds a finished run or another recipe.
        MissingFileError, DataError, ModelError: the model or the data cannot be used.
    """
    check_model_folder(config.model)
    base = describe_model(config.model, dtype=config.dtype, engine="transformers")
    source, teacher = open_data(config.data, config.model)
    inputs = describe_inputs(config)
    (data,) = digests_of(inputs).values()
    checkpoint = runs.begin(config, data=data, base=base)
    objective = Objective("cross_entropy", workspace_bytes=config.workspace)
    trained = runs.train(config, source, objective, model_path=config.model, checkpoint=checkpoint)
    lineage = {"sft_teacher": teacher, "declared": False, "initial_student": None}
    return finish_checkpoint(config, "sft", base=base, inputs=inputs, lineage=lineage, **trained)


def finish_checkpoint(config: Any, stage: str, **parts: Any) -> Path:
    """Write the manifest of a trained model, once for all processes; returns the model's folder."""
    if runs.is_first():
        model = describe_model(config.out, dtype=config.dtype, engine="transformers")
        manifest = build_manifest(
            "checkpoint", stage=stage, config=asdict(config), model=model, **parts
        )
        write_manifest(config.out, manifest)
    return Path(config.out)


def describe_inputs(config: SftConfig) -> dict[str, Any]:
    """Describe the training data for the manifest."""
    if Path(config.data).is_file():
        return {"demonstrations": describe_file(config.data)}
    store = RolloutStore.open(config.data, kind="sft_data")
    return {"sft_data": {"digest": store.digest(), "model": store.manifest.model}}


def open_data(data: str, model: str) -> tuple[Source, dict[str, Any] | None]:
    """Open the answers.

    Returns:
        The sequences, and the description of the teacher that sampled them, None if unknown.

    Raises:
        ProvenanceError: the answers were sampled with another tokenizer.
        MissingFileError, DataError, ShardError: the data cannot be used.
    """
    tokenizer = load_tokenizer(model)
    if Path(data).is_file():
        return load_sft_jsonl(data, tokenizer), None
    store = RolloutStore.open(data, kind="sft_data")
    if runs.is_first():  # the other processes wait for it when the run begins
        store.verify()
    check_tokenizer(store, tokenizer, model)
    return store, store.manifest.model.as_teacher()


def check_tokenizer(store: RolloutStore, tokenizer: Any, model: str) -> None:
    """Check that all ids in the answers stand for the same tokens in `model` as in the teacher.

    Raises:
        ProvenanceError: an id stands for different tokens, or the tokenizers differ and the
            teacher's vocabulary was not stored with the answers.
    """
    if tokenizer_digest(model) == store.manifest.model.tokenizer:
        return
    remedy = "fine-tune a model with the teacher's tokenizer"
    try:
        teacher_vocab = load_vocab(store.path)
    except MissingFileError:
        raise ProvenanceError(
            f"{store.path}: its answers were sampled with another tokenizer than that of {model}, "
            f"and the teacher's vocabulary, needed to compare them, is missing; {remedy}"
        ) from None
    if found := differing_token(tokenizer.get_vocab(), teacher_vocab, store.used_ids()):
        index, student_token, teacher_token = found
        raise ProvenanceError(
            f"{store.path}: id {index} is {teacher_token!r} to the teacher and {student_token!r} "
            f"to {model}; {remedy}"
        )
