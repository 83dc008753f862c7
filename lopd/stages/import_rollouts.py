"""Make a store of rollouts from those of another tool (`lopd import --format rollouts`).

`lopd.data.external_rollouts` describes the shapes. That the student sampled them is declared, not
verified. The manifest records in `inputs.source.retokenized` how many were tokenised from text
again, and in `scoring` whether log-probs of the rollouts are absent.
"""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from lopd.config.import_scores import ImportConfig
from lopd.data.external_rollouts import Imported, read_rollouts
from lopd.data.records import describe_data
from lopd.data.rendering import PromptEncoder
from lopd.data.skipped import Skipped
from lopd.errors import DataError
from lopd.models.limits import ModelLimits
from lopd.models.load import check_model_folder, context_of, load_tokenizer
from lopd.provenance import (
    ModelIdentity,
    build_manifest,
    describe_model,
    eos_ids_of,
    lineage_of,
    save_vocab,
    vocab_size_of,
)
from lopd.stages.finished import say_finished
from lopd.store import RolloutWriter


def import_rollouts(config: ImportConfig) -> Path:
    """Read the file twice: to check and count, then to write. Returns the folder of rollouts.

    Raises:
        DataError: a record is invalid (names it), or some records only have log-probs.
        MissingFileError: the file or the student's folder does not exist.
    """
    check_model_folder(config.student)
    tokenizer = load_tokenizer(config.student)
    encoder, eos_ids = PromptEncoder(tokenizer), eos_ids_of(config.student) or []
    limits = ModelLimits(
        "the student",
        vocab_size_of(config.student),
        context_of(config.student),
        length_remedy="remove the record",
        id_remedy="name the student whose tokenizer made the ids",
    )

    def read(skipped: Skipped) -> Iterator[Imported]:
        return read_rollouts(
            config.source,
            encoder,
            eos_ids,
            limits=limits,
            skipped=skipped,
            retokenize=config.retokenize,
        )

    skipped = Skipped(config.source, bool(config.skip_bad_records))
    count, known, retokenized = _count(config.source, read(skipped))
    skipped.report()
    full, rest = divmod(count, config.shard_size)
    described = describe_model(config.student, dtype="unspecified", engine="unspecified").raw
    source = {**describe_data(config.source), "format": config.format}
    if retokenized:
        source["retokenized"] = retokenized
    if skipped.errors:
        source["left_out"] = len(skipped.errors)
    manifest = build_manifest(
        "rollouts",
        stage="import",
        config=asdict(config),
        model=ModelIdentity.from_json({**described, "declared": True}),
        inputs={"source": source},
        lineage=lineage_of(config.student),
        plan={"shards": [config.shard_size] * full + [rest] * bool(rest)},
        declared=True,
        scoring={"rollout_logprobs": "computed" if known else "absent"},
    )
    with RolloutWriter.create(config.out, manifest) as writer:
        missing = writer.missing()
        if missing:
            save_vocab(config.student, config.out)
        else:
            say_finished(config.out)
        rollouts = read(Skipped(config.source, bool(config.skip_bad_records)))
        for shard, size in enumerate(manifest.shards):
            part = [item.rollout for item in islice(rollouts, size)]
            if shard in missing:
                writer.write(shard, part)
        writer.finish()
    return Path(config.out)


def _count(source: str, items: Iterator[Imported]) -> tuple[int, bool, int]:
    """The number of rollouts, whether they have log-probs, and how many were tokenised again."""
    count = known = retokenized = 0
    for item in items:
        count += 1
        known += not np.isnan(item.rollout.rollout_logprobs).any()
        retokenized += item.retokenized
    if not count:
        raise DataError(f"{source}: holds no usable records; expected at least one")
    if known not in (0, count):
        raise DataError(
            f"{source}: {known} of {count} rollouts have log-probs; expected all or none"
        )
    return count, known > 0, retokenized
