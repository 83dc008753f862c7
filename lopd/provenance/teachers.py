"""Several teachers: the identity that stands for all of them, and how messages call them."""

from collections.abc import Mapping
from typing import Any

from lopd.provenance.io import json_digest
from lopd.provenance.manifest import ModelIdentity


def combined(teachers: Mapping[str, ModelIdentity]) -> ModelIdentity:
    """What a manifest has as its `model` where several teachers made an artefact.

    Its digests are those of the parts of all teachers, so that they are equal to those of no single
    model; `vocab_size` is the largest. A part in which the teachers agree is theirs.
    """
    models = [teachers[name] for name in sorted(teachers)]

    def agree(part: str) -> bool:
        return all(getattr(model, part) == getattr(models[0], part) for model in models)

    def shared(part: str) -> Any:
        """The value that all have; else None."""
        return getattr(models[0], part) if agree(part) else None

    def digest(part: str) -> Any:
        if agree(part) and part != "weights":
            return getattr(models[0], part)
        return json_digest({name: getattr(model, part) for name, model in teachers.items()})

    return ModelIdentity.from_json(
        {
            "path": f"{len(models)} teachers ({', '.join(sorted(teachers))})",
            **{part: digest(part) for part in ("weights", "config", "tokenizer", "chat_template")},
            "eos_ids": None if shared("eos_ids") is None else [*shared("eos_ids")],
            "vocab_size": max(model.vocab_size or 0 for model in models) or None,
            "dtype": shared("dtype"),
            "engine": shared("engine"),
        }
    )


def described(teachers: Mapping[str | None, ModelIdentity]) -> dict[str, Any]:
    """The entries of a manifest about the models that sampled or scored its sequences.

    Args:
        teachers: by name, or one under None.
    """
    if None in teachers:
        return {"model": teachers[None]}
    named = {str(name): teachers[name] for name in sorted(map(str, teachers))}
    return {"model": combined(named), "teachers": named}


def lineage_entries(teachers: Mapping[str | None, ModelIdentity]) -> dict[str, Any]:
    """The entries of a lineage about the teachers whose answers a student is fine-tuned on."""
    entries = described(teachers)
    if "teachers" not in entries:
        return {"sft_teacher": entries["model"].as_teacher()}
    return {
        "sft_teacher": entries["model"].as_teacher(),
        "sft_teachers": {name: model.as_teacher() for name, model in entries["teachers"].items()},
    }


def records_of(name: str | None) -> str:
    """The records of a teacher in messages: empty, or "records of NAME "."""
    return "" if name is None else f"records of '{name}' "
