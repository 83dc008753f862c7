"""The student that made the rollouts: found, compared, and what the lists hold of it."""

from pathlib import Path
from typing import Any

from lopd.config.score import ScoreConfig
from lopd.engines.support import Support, words
from lopd.errors import MissingFileError, ProvenanceError
from lopd.models.limits import ModelLimits
from lopd.models.load import check_model_folder
from lopd.provenance import ModelIdentity, describe_model
from lopd.provenance.manifest import short


def find_student(named: str | None, policy: ModelIdentity) -> str:
    """The folder of the student: the one that is named, else the one that the rollouts name.

    Args:
        named: of `--student`.
        policy: the model that made the rollouts, by their manifest.

    Raises:
        MissingFileError: none is named, and the folder of the rollouts is not there any more.
    """
    if named is not None:
        return str(check_model_folder(named))
    if policy.path is None or not Path(policy.path).is_dir():
        hint = f" ({policy.hub})" if policy.hub else ""
        raise MissingFileError(
            f"student: the rollouts were made by {policy.path or 'an unknown folder'}{hint}, which "
            "is not there; name the student that made them with --student"
        )
    return policy.path


def describe_support(
    config: ScoreConfig, support: Support, policy: ModelIdentity
) -> dict[str, Any]:
    """The ids that the lists hold and, where some are the student's, that student.

    Raises:
        ProvenanceError: the student did not make the rollouts.
        ConfigError: k or extra_ids is beyond its vocabulary.
    """
    described: dict[str, Any] = {
        "ids": words(support.list_of, support.extra_ids),
        "list_of": support.list_of,
        "extra_ids": 0 if support.list_of == "student" else support.student_k,
    }
    if support.eos_class:
        described["eos_class"] = support.eos_class
    if not support.student_k:
        return described
    folder = find_student(config.student, policy)
    student = describe_model(folder, dtype=config.dtype, engine="transformers")
    if student.weights != policy.weights:
        raise ProvenanceError(
            f"student: {folder} has weights {short(student.weights)}, the rollouts were made by "
            f"{short(policy.weights)}; name the student that made them"
        )
    assert student.vocab_size is not None
    name = "extra_ids" if support.list_of == "teacher" else "k"
    ModelLimits("the student", student.vocab_size).check_k(support.student_k, name)
    return described | {"student": student}
