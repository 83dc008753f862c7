"""Records of JSONL and parquet: the same prompts, and errors that name each fault."""

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TEMPLATE, train_bpe

from lopd.data.jsonl import read_records
from lopd.data.prompts import load_prompts
from lopd.errors import ConfigError, DataError, MissingFileError

MESSAGES = [{"role": "user", "content": "the cat"}]


def write_parquet(path, records):
    names = dict.fromkeys(name for record in records for name in record)
    pq.write_table(pa.table({name: [r.get(name) for r in records] for name in names}), path)
    return path


def test_prompts_are_the_same_from_jsonl_and_parquet(tmp_path, write_jsonl):
    tokenizer = train_bpe(TEMPLATE)
    records = [
        {"prompt": "the cat", "answer": "sat"},
        {"messages": MESSAGES},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "sat", "name": "x"}], "id": "b"},
    ]
    expected = load_prompts(write_jsonl(records), tokenizer)
    found = load_prompts(write_parquet(tmp_path / "p.parquet", records), tokenizer)
    assert found == expected


def test_rows_beyond_one_batch_keep_their_numbers(tmp_path):
    records = [{"prompt": str(i)} for i in range(600)]
    found = list(read_records(write_parquet(tmp_path / "p.parquet", records)))
    assert [record for _, record in found] == records
    assert found[-1][0].endswith("p.parquet: row 600")


def test_bad_rows_and_files_are_named(tmp_path):
    tokenizer = train_bpe()
    path = write_parquet(tmp_path / "p.parquet", [{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(DataError, match="p.parquet: row 2: 'prompt' is empty"):
        load_prompts(path, tokenizer)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="p.parquet: not a complete parquet file"):
        load_prompts(path, tokenizer)
    with pytest.raises(MissingFileError, match="absent.parquet: no such file"):
        load_prompts(tmp_path / "absent.parquet", tokenizer)


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "p.parquet", [{"prompt": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow; pip install 'lopd\[parquet\]'"):
        list(read_records(path))


LINES = {
    "deep": "[" * 100_000,
    "deep object": '{"prompt": ' * 1000 + "1" + "}" * 1000,
    "half a pair": r'{"prompt": "\ud800"}',
    "half a pair in an id": r'{"prompt": "a", "id": "\udfff"}',
    "a key twice": '{"prompt": "a", "prompt": "b"}',
    "a number": "7",
    "torn": '{"prompt": "a',
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_that_is_no_record_is_named_or_skipped(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + '\n{"prompt": "b"}\n')
    with pytest.raises(DataError, match="p.jsonl:2: "):
        list(read_records(path))
    errors = []
    found = [record["prompt"] for _, record in read_records(path, skip=errors.append)]
    assert found == ["a", "b"] and len(errors) == 1 and "p.jsonl:2: " in str(errors[0])
