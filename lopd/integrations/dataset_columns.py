"""Columns of scored sequences in a `datasets.Dataset`: their types, checked."""

import pyarrow as pa
from datasets import Dataset

from lopd.errors import DataError

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
REQUIRED = {
    "prompt_token_ids": _INTS,
    "response_token_ids": _INTS,
    "topk_ids": pa.list_(_INTS),
    "topk_logprobs": pa.list_(_FLOATS),
    "teacher_logprobs": _FLOATS,
    "tail_logprobs": _FLOATS,
}
OPTIONAL = {
    "id": pa.string(),
    "sample": pa.int32(),
    "loss_mask": pa.list_(pa.bool_()),
    "finish_reason": pa.string(),
    "teacher_entropy": _FLOATS,
    "rollout_logprobs": _FLOATS,
    "rollout_logprobs_raw": _FLOATS,
    "weight": pa.float32(),
    "reward": pa.float32(),
    "token_weights": _FLOATS,
    "teacher_id": pa.string(),
}
COLUMNS = {**REQUIRED, **OPTIONAL}
# Columns that only the teacher's scores need.
SCORES = {"topk_ids", "topk_logprobs", "teacher_logprobs", "tail_logprobs", "teacher_entropy"}


def usable_columns(dataset: Dataset) -> list[str]:
    """The columns that are read, checked for presence and type."""
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"found a {type(dataset).__name__}; expected a datasets.Dataset with the columns "
            f"{', '.join(REQUIRED)}"
        )
    if absent := [name for name in REQUIRED if name not in dataset.column_names]:
        raise DataError(
            f"dataset: no column '{absent[0]}'; found {sorted(dataset.column_names)}; "
            "lopd.integrations.datasets.to_dataset writes it; to use the scores of another tool, "
            "write a file and run 'lopd import --format topk'"
        )
    if not len(dataset):
        raise DataError("dataset: no rows; expected at least one")
    schema = dataset.data.schema
    names = [name for name in COLUMNS if name in dataset.column_names]
    for name in names:
        if not _fits(schema.field(name).type, COLUMNS[name]):
            raise DataError(
                f"dataset: column '{name}' is {schema.field(name).type}; expected {COLUMNS[name]}"
            )
    return names


def _fits(found: pa.DataType, expected: pa.DataType) -> bool:
    """Whether values of a type can be read as another of the same kind and depth."""
    kinds = pa.types
    if kinds.is_list(expected):
        is_list = (
            kinds.is_list(found) or kinds.is_large_list(found) or kinds.is_fixed_size_list(found)
        )
        return is_list and _fits(found.value_type, expected.value_type)
    if kinds.is_floating(expected):
        return kinds.is_floating(found)
    if kinds.is_integer(expected):
        return kinds.is_integer(found)
    if kinds.is_boolean(expected):
        return kinds.is_boolean(found)
    return kinds.is_string(found) or kinds.is_large_string(found)
