"""Fine-tune the student on the teacher's answers (`lopd sft`).

The manifest of the checkpoint records the teacher's fingerprint, so that `lopd distill` can
check that the same teacher scored the rollouts.
"""

import logging
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from lopd.config.objective import Objective
from lopd.config.sft import SftConfig
from lopd.data.demonstrations import load_demonstrations
from lopd.data.records import describe_data
from lopd.data.rendering import PromptEncoder, parse_date
from lopd.errors import ConfigError, MissingFileError, ProvenanceError
from lopd.models.load import check_model_folder, load_tokenizer
from lopd.provenance import (
    MANIFEST_NAME,
    ModelIdentity,
    build_manifest,
    describe_model,
    differing_token,
    digests_of,
    load_vocab,
    tokenizer_digest,
    write_manifest,
)
from lopd.provenance.gate import check_eos
from lopd.provenance.manifest import RECIPE_NAME
from lopd.provenance.teachers import described, lineage_entries
from lopd.stages.finished import is_finished, say_finished
from lopd.stages.model_access import loads_models
from lopd.store import RolloutStore
from lopd.training import run as runs
from lopd.training.batch import Source

LOG = logging.getLogger(__name__)


@loads_models
def main(config: SftConfig) -> Path:
    """Train, save the model and, last, its manifest. Returns the model's folder.

    Raises:
        ProvenanceError: the answers were sampled with another tokenizer, or end with other ids.
        ConfigError: `out` holds a finished run or another recipe.
        MissingFileError, DataError, ModelError: the model or the data cannot be used.
    """
    check_model_folder(config.model)
    if is_finished(config, "sft", config.model, describe_inputs):
        return say_finished(config.out)
    base = describe_model(config.model, dtype=config.dtype, engine="transformers")
    source, teachers, written = open_data(config)
    inputs = describe_inputs(config)
    overrides, what = [], f"answers of {config.model}"
    for name, teacher in teachers.items():
        overrides += check_eos(teacher, base, what, config.allow_eos_mismatch, name=name)
        _warn_of_template(teacher, base)
    (data,) = digests_of(inputs).values()
    if written is not None:
        inputs["demonstrations"]["reading"] = {"date": written}
    skips = {"skip_bad_records": "yes"} if config.skip_bad_records else {}
    checkpoint = runs.begin(config, data=data, prompt_date_written=written, **skips, base=base)
    objective = Objective("cross_entropy", workspace_bytes=config.workspace)
    trained = runs.train(config, source, objective, model_path=config.model, checkpoint=checkpoint)
    taught = lineage_entries(teachers) if teachers else {"sft_teacher": None}
    lineage = {**taught, "declared": False, "initial_student": None}
    parts = {"base": base, "inputs": inputs, "lineage": lineage, "overrides": overrides}
    return finish_checkpoint(config, "sft", **parts, **trained)


def _warn_of_template(teacher: ModelIdentity, base: ModelIdentity) -> None:
    """Say that the model would see other prompts than those that it is fine-tuned on."""
    wrote = teacher.chat_template
    if runs.is_first() and wrote is not None and wrote != base.chat_template:
        LOG.warning(
            f"{base.path}: its chat template is not that of {teacher.path}, which wrote those "
            "prompts of this data that are messages; rollouts will use the model's own, so copy "
            "the template unless all prompts are text"
        )


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
    if not _is_store(config.data):
        return {"demonstrations": describe_data(config.data)}
    store = RolloutStore.open(config.data, kind="sft_data")
    return {"sft_data": {"digest": store.digest(), **described(store.manifest.models)}}


def open_data(
    config: SftConfig,
) -> tuple[Source, dict[str | None, ModelIdentity], str | None]:
    """Open the answers.

    Returns:
        The sequences; the teachers that sampled them by name, or one under None, none if unknown;
        the date that the chat template wrote into prompts, if it wrote one.

    Raises:
        ConfigError: a setting about prompts, for answers that are tokens already.
        ProvenanceError: the answers were sampled with another tokenizer.
        MissingFileError, DataError, ShardError: the data cannot be used.
    """
    tokenizer = load_tokenizer(config.model)
    if not _is_store(config.data):
        encoder = PromptEncoder(tokenizer, config, _recorded_date(config.out))
        return load_demonstrations(config.data, encoder), {}, encoder.date
    for name in ("columns", "chat_template_kwargs", "special_tokens", "prompt_date"):
        if getattr(config, name) is not None:
            spelt = name.replace("_", "-")
            raise ConfigError(
                f"{name}: {config.data} holds tokens, which lopd sft-data made of its prompts; "
                f"pass --{spelt} to that command"
            )
    store = RolloutStore.open(config.data, kind="sft_data")
    if runs.is_first():  # the other processes wait for it when the run begins
        store.verify()
    check_tokenizer(store, tokenizer, config.model)
    return store, store.manifest.models, None


def _is_store(data: str) -> bool:
    """Whether the answers are a folder that a stage wrote, and not data files."""
    folder = Path(data)
    return folder.is_dir() and (folder / MANIFEST_NAME).exists()


def _recorded_date(out: str) -> date | None:
    """The date that an interrupted run into this folder wrote into prompts, if any."""
    if not (file := Path(out) / RECIPE_NAME).is_file():
        return None
    text = runs.read_recipe(file).get("prompt_date_written")
    return parse_date(text, str(file)) if text is not None else None


def check_tokenizer(store: RolloutStore, tokenizer: Any, model: str) -> None:
    """Check that all ids in the answers stand for the same tokens in `model` as in the teacher.

    Raises:
        ProvenanceError: an id stands for different tokens, or the tokenizers differ and the
            teacher's vocabulary was not stored with the answers.
    """
    ours = tokenizer_digest(model)
    for name, teacher in store.manifest.models.items():
        if teacher.tokenizer != ours:
            _check_tokens(store, tokenizer, model, name)


def _check_tokens(store: RolloutStore, tokenizer: Any, model: str, name: str | None) -> None:
    remedy = "fine-tune a model with the teacher's tokenizer"
    try:
        teacher_vocab = load_vocab(store.path, store.manifest.models[name].tokenizer)
    except MissingFileError:
        raise ProvenanceError(
            f"{store.path}: its answers were sampled with another tokenizer than that of {model}, "
            f"and the teacher's vocabulary, needed to compare them, is missing; {remedy}"
        ) from None
    if found := differing_token(tokenizer.get_vocab(), teacher_vocab, store.used_ids(name)):
        index, student_token, teacher_token = found
        raise ProvenanceError(
            f"{store.path}: id {index} is {teacher_token!r} to the teacher and {student_token!r} "
            f"to {model}; {remedy}"
            if teacher_token is not None
            else f"{store.path}: the teacher sampled id {index}, an unused row of its head, which "
            f"{model} reads as {student_token!r}; sample the answers again"
        )
