"""What the TRL trainer is given: sequences by number, and the student that they belong to."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from lopd.config.distill import DistillConfig
from lopd.config.objective import Objective
from lopd.errors import MissingFileError, ModelError
from lopd.integrations.trl_config import OfflineDistillationConfig
from lopd.models.head import plain_model
from lopd.models.hub import local_folder
from lopd.models.load import check_model_folder
from lopd.provenance import build_manifest, describe_model, write_manifest
from lopd.provenance.manifest import Override
from lopd.provenance.remote_code import loading_code, trusting_code
from lopd.stages.distill import open_cache, origin
from lopd.store import TeacherCache
from lopd.training.batch import Batch, Collator, SequenceDataset
from lopd.training.run import is_first

LOG = logging.getLogger(__name__)


class Student:
    """The folder of the model that a trainer is given, by which provenance is checked.

    Args:
        model: a folder, a hub id or a model.
        args: settings of the trainer.

    Raises:
        MissingFileError, ModelError: the name is no model's.
    """

    def __init__(self, model: Any, args: OfflineDistillationConfig) -> None:
        self.args, self._warned = args, False
        with trusting_code(args.trust_remote_code):
            self.folder, self._unknown = _folder_of(model, args)
        self._made_of: dict[str, Any] | None = None

    def check(self, data: Any) -> list[Override]:
        """Check that a cache and the student belong together, as `lopd distill` does.

        Prints once that other data, or a model without a folder, cannot be checked.

        Returns:
            The overrides that were needed.

        Raises:
            ProvenanceError: they do not.
            ShardError: a shard is altered, or missing and the student has no folder.
        """
        if not isinstance(data, TeacherCache):
            self._warn(
                f"a {type(data).__name__} does not record which teacher scored it and which model "
                "gave its answers; train on the TeacherCache to have that checked"
            )
            return []
        settings = self.settings(data)
        if self.folder is None:
            self._warn(
                f"{self._unknown}; pass the folder of the model that made the rollouts to have "
                "that checked"
            )
            if not settings.allow_incomplete_cache:
                data.check_complete()
            return []
        with trusting_code(self.args.trust_remote_code):
            overrides = open_cache(settings)[1]
        self.args.distributed_state.wait_for_everyone()  # the first process verifies the shards
        return overrides

    def settings(self, data: Any) -> DistillConfig:
        """The settings of `lopd distill` that stand for the trainer's, on these data."""
        cache = str(data.path) if isinstance(data, TeacherCache) else "dataset"
        return self.args.distill_config(self.folder or "model", cache)

    def remember(self, data: Any, objective: Objective, overrides: list[Override]) -> None:
        """Keep what the manifest of the result says; the student's folder may be written over."""
        if self.folder is None or not isinstance(data, TeacherCache):
            return
        settings = self.settings(data)
        with trusting_code(self.args.trust_remote_code):
            base = describe_model(self.folder, dtype="unspecified", engine="transformers")
            made_of = origin(settings, objective, base)
        named = {"student": settings.student, "cache": settings.cache}
        config = {**self.args.to_dict(), **named}
        self._made_of = {"stage": "trl", "config": config, "overrides": overrides, **made_of}

    def write_manifest(self, out: str | Path, model: Any) -> None:
        """Write the manifest of the trained model that was saved in a folder, if it has one.

        Adapters alone are no model, so their folder has none.
        """
        if self._made_of is None or not is_first() or plain_model(model) is not model:
            return
        with trusting_code(self.args.trust_remote_code):
            dtype = str(model.dtype).removeprefix("torch.")
            saved = describe_model(out, dtype=dtype, engine="transformers")
        write_manifest(out, build_manifest("checkpoint", model=saved, **self._made_of))

    def _warn(self, why: str) -> None:
        if not self._warned and is_first():
            LOG.warning(f"provenance is not checked: {why}")
        self._warned = True


def _folder_of(model: Any, args: OfflineDistillationConfig) -> tuple[str | None, str]:
    """The folder with the weights of a model; None and the reason if there is none."""
    if isinstance(model, (str, os.PathLike)):
        options: Any = args.model_init_kwargs or {}
        revision = options.get("revision")
        name = f"{model}@{revision}" if revision and not Path(model).exists() else str(model)
        return str(check_model_folder(local_folder(name))), ""
    if plain_model(model) is not model:
        return None, "the model has adapters already"
    name, commit = model.name_or_path, getattr(model.config, "_commit_hash", None)
    if not name:  # built from a config
        return None, "the model was not loaded from a folder or the hub"
    try:
        folder = check_model_folder(local_folder(f"{name}@{commit}" if commit else name))
        same = [_has_weights_of(model, folder) if is_first() else None]
    except (MissingFileError, ModelError) as error:
        return None, f"the weights that the model was loaded from are not found ({error})"
    if args.world_size > 1:  # training begins with the first process's weights
        broadcast_object_list(same)
    if not same[0]:
        return None, f"the model has other weights than {folder}, which it names as its own"
    return str(folder), ""


def _has_weights_of(model: Any, folder: Path) -> bool:
    """Whether a model has the weights in a folder, in its own dtypes.

    They are loaded as transformers does, since names and layouts on disk may be others.

    Raises:
        ModelError: they cannot be loaded.
    """
    with loading_code(folder, "cannot be loaded again") as options:
        saved = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, **options
        )
    expected, found = saved.state_dict(), model.state_dict()
    return expected.keys() == found.keys() and all(
        torch.equal(value.to("cpu", found[name].dtype), found[name].cpu())
        for name, value in expected.items()
    )


class NumberedSequences:
    """A data collator that fetches the sequences whose numbers it is given.

    TRL asks for a `datasets.Dataset`; this one holds numbers only, so that a cache is neither
    copied nor read before its sequences are needed.
    """

    def __init__(self) -> None:
        self.sources: dict[str, SequenceDataset] = {}
        self.collator = Collator()

    def add(self, name: str, sequences: SequenceDataset) -> Dataset:
        """The numbers of these sequences, and their lengths."""
        self.sources[name] = sequences
        count = len(sequences)
        return Dataset.from_dict(
            {"source": [name] * count, "index": range(count), "length": sequences.lengths}
        )

    def of(self, numbers: Dataset) -> SequenceDataset:
        """The sequences that were given these numbers."""
        return self.sources[numbers[0]["source"]]

    def knows(self, data: Any) -> bool:
        """Whether the data are numbers already."""
        if isinstance(data, Mapping):
            return all(self.knows(part) for part in data.values())
        columns = {"source", "index", "length"}
        return isinstance(data, str) or columns == {*getattr(data, "column_names", ())}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """A batch of the sequences."""
        (name,) = {row["source"] for row in rows}
        return self.collator(self.sources[name].__getitems__([row["index"] for row in rows]))
