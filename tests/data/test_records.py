"""Records of JSONL and parquet: the same prompts, and errors that name each fault."""

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import TEMPLATE, train_bpe

from lopd.data.prompts import load_prompts
from lopd.data.records import describe_data, read_records
from lopd.data.rendering import PromptEncoder
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
    expected = load_prompts(write_jsonl(records), PromptEncoder(tokenizer))
    found = load_prompts(write_parquet(tmp_path / "p.parquet", records), PromptEncoder(tokenizer))
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
        load_prompts(path, PromptEncoder(tokenizer))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="p.parquet: not a complete parquet file"):
        load_prompts(path, PromptEncoder(tokenizer))
    with pytest.raises(MissingFileError, match="absent.parquet: no such file"):
        load_prompts(tmp_path / "absent.parquet", PromptEncoder(tokenizer))


def test_without_pyarrow_the_remedy_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "p.parquet", [{"prompt": "a"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow; pip install 'lopd\[parquet\]'"):
        list(read_records(path))


def test_the_same_records_from_every_format(tmp_path):
    records = [{"prompt": "a", "n": 1}, {"prompt": "\u00e9\u4e2d", "n": 2}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    array = json.dumps(records, indent=2)
    files = {
        "p.jsonl": lines.encode(),
        "p.jsonl.gz": gzip.compress(lines.encode()),
        "p.json": array.encode(),
        "p.json.gz": gzip.compress(array.encode()),
        "lines.json": lines.encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode(),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert [record for _, record in read_records(tmp_path / name)] == records, name


def test_a_folder_is_its_files_in_order(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_infos.json").write_text("{}")
    for part in (1, 0):
        write_parquet(folder / f"train-{part:05}-of-00002.parquet", [{"prompt": str(part)}])
    assert [record["prompt"] for _, record in read_records(folder)] == ["0", "1"]
    first = describe_data(folder)
    assert first["files"] == 2
    write_parquet(folder / "train-00001-of-00002.parquet", [{"prompt": "other"}])
    assert describe_data(folder)["sha256"] != first["sha256"]
    write_parquet(folder / "test-00000-of-00001.parquet", [{"prompt": "2"}])
    with pytest.raises(DataError, match="holds the splits test, train"):
        list(read_records(folder))
    (folder / "more.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"holds \.parquet and \.jsonl files"):
        list(read_records(folder))
    with pytest.raises(MissingFileError, match=f"name a folder inside it, such as {folder}"):
        list(read_records(tmp_path))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.json", b'[{"a": [{"b": "\\uDFFF"}]}]', "half of a surrogate pair"),
        ("p.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ":1: not JSON"),
        ("p.jsonl", b"{\n", "in a file whose name ends in .json"),
        ("p.jsonl", b"PAR1....", "it is parquet"),
        ("p.csv", b"prompt,answer\n", "convert csv files"),
        ("p.jsonl.zst", b"\x28\xb5\x2f\xfd\n", "decompress it first"),
        ("p.jsonl.gz", b'{"prompt": "a"}\n', "cannot be read"),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-9], "cannot be read"),
        ("p.json", b"[1]", "record 1: found a int; expected an object"),
        ("p.json", b"[{", "not JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(read_records(tmp_path / name))


def test_a_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\\ud83d\\ude00"}\n')
    assert [r["prompt"] for _, r in read_records(tmp_path / "p.jsonl")] == ["\U0001f600"]


def test_a_record_that_is_too_long_is_refused_unread(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "' + b"a" * 99 + b'"}\n')
    with pytest.raises(DataError, match="p.jsonl:2: longer than 64 bytes"):
        list(read_records(tmp_path / "p.jsonl", max_bytes=64))


def test_nulls_in_parquet_are_left_out_where_the_first_element_is_one(tmp_path):
    records = [{"prompt": "a", "tops": [None, {"x": 1, "y": None}]}]
    ((_, found),) = read_records(write_parquet(tmp_path / "p.parquet", records))
    assert found["tops"] == [None, {"x": 1}]


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
