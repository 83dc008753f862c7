"""Mutations of files by a seeded generator: of bytes, of JSON values, of YAML lines."""

import io
import json
import random
import struct
from typing import Any

# What a careless or hostile writer puts where a value is expected; text is inserted unquoted.
_DEEP = ("[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200, "[" * 100_000)
VALUES = (
    *("null", "true", '""', '" "', "[]", "{}", "[[]]", "[null]", '{"a": 1}', "[1, [2]]"),
    *("0", "-1", "1.5", "-0.0", "-100", str(2**31), str(2**63), "1" + "0" * 30, "9" * 5000),
    *("1e999", "NaN", "-Infinity", '"\\ud800"', '"\\u0000"', '"../../x"', '"%s{}"'),
    *(*_DEEP, '"' + "x" * 10_000 + '"', '[{"id": 1}]', '{"logprob": null}'),
)
_YAML = (
    *("010", "yes", "~", "2026-01-01", "[--out, /x]", "!!python/name:os.system", "&a [*a]", "*b"),
    *("|", "? x", "\t", "<<: 1", "0x10", ".nan", "1_0", "'"),
)
MARK = "@mutated@"


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, repeat, or overwrite some bytes."""
    if not data:
        return rng.randbytes(3)
    at, length = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 64, 512))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == 4:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    if kind == 5:
        return data[:at] + b"\0" * length + data[at + length :]
    return data[:at] + rng.choice(VALUES).encode() + data[at + length :]


def of_json(rng: random.Random, data: bytes) -> bytes:
    """Change one value of a JSON document, a key, or an object's set of keys."""
    value = json.loads(data)
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES).encode()
    parent, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
        return json.dumps(value).encode()
    if kind == 1 and isinstance(parent, dict):  # the key is there twice
        parent[MARK] = 0
        return json.dumps(value).replace(f'"{MARK}"', json.dumps(key)).encode()
    if kind == 2 and isinstance(parent, dict):
        parent[rng.choice(("", "x", "a\nb", key + " ", "\ud800"))] = parent.pop(key)
        return json.dumps(value).encode()
    if kind == 3 and type(parent[key]) in (int, float):
        number = parent[key]
        parent[key] = rng.choice((number + 1, -number, str(number), number * 10**30, [number]))
        return json.dumps(value).encode()
    if kind == 4:  # a value from elsewhere in the document
        other, name = rng.choice(places)
        parent[key] = json.loads(json.dumps(other[name]))
        return json.dumps(value).encode()
    parent[key] = MARK
    return json.dumps(value).replace(f'"{MARK}"', rng.choice(VALUES), 1).encode()


def of_lines(rng: random.Random, data: bytes) -> bytes:
    """Change one line of a JSONL file."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at] = of_json(rng, lines[at]).replace(b"\n", b" ") + b"\n"
    return b"".join(lines)


def of_header(rng: random.Random, data: bytes) -> bytes:
    """Change the JSON header of a safetensors file, with its right length."""
    (length,) = struct.unpack("<Q", data[:8])
    header = of_json(rng, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def of_yaml(rng: random.Random, data: bytes) -> bytes:
    """Change the value of one line of `name: value` lines, or add YAML's own oddities."""
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    value = rng.choice((*_YAML, *VALUES))
    kind = rng.randrange(3)
    if kind == 0:
        lines[at] = lines[at].split(":")[0] + ": " + value
    elif kind == 1:
        lines.insert(at, lines[rng.randrange(len(lines))])
    else:
        lines.insert(at, value)
    return "\n".join(lines).encode()


def of_rows(rng: random.Random, data: bytes) -> bytes:
    """Change a value in the rows of a parquet file, as `of_json` does."""
    from pyarrow import ArrowException, BufferReader, Table, parquet

    out = io.BytesIO()
    try:
        rows = parquet.read_table(BufferReader(data)).to_pylist()
        changed = json.loads(of_json(rng, json.dumps(rows).encode()))
        parquet.write_table(Table.from_pylist(changed), out)
    except (ArrowException, ArithmeticError, AttributeError, OSError) as error:
        raise ValueError("no table") from error
    return out.getvalue()


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value."""
    pending = [value]
    while pending:
        part = pending.pop()
        keys = (
            part if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else ()
        )
        for key in keys:
            yield part, key
            if isinstance(part[key], dict | list):
                pending.append(part[key])
