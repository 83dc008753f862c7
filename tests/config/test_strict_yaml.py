"""YAML: text stays text, and what would be guessed, repeated or expanded is refused."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lopd.config.strict_yaml import LARGEST, load_yaml, parse_yaml
from lopd.errors import ConfigError, MissingFileError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


def test_scalars_are_text_except_null():
    text = "a: 010\nb: no\nc: 8e-5\nd: 2024-01-01\ne: 1:30\nf: null\ng:\nh: 'null'\ni: ~\n"
    assert parse_yaml(text, "r.yaml") == {
        **{"a": "010", "b": "no", "c": "8e-5", "d": "2024-01-01", "e": "1:30"},
        **{"f": None, "g": None, "h": "null", "i": None},
    }


def test_keys_are_text():
    assert parse_yaml("1: a\nyes: b\n<<: {c: d}", "r.yaml") == {
        "1": "a",
        "yes": "b",
        "<<": {"c": "d"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "r.yaml, line 3: 'a' is set twice"),
        ("s: {k: 1, k: 1}", "r.yaml, line 1: 'k' is set twice"),
        ("a: &x 1\nb: *x", "r.yaml: not YAML (aliases are not supported"),
        ("a: &a {<<: *a}", "aliases are not supported"),
        (BOMB, "aliases are not supported"),
        ("a: !!python/object/apply:os.getcwd []", "found the tag tag:yaml.org,2002:python/object"),
        ("a: !!binary aGk=", "found the tag tag:yaml.org,2002:binary; expected none"),
        ("? [a]\n: b", "found a list or mapping as a key"),
        ("- 1", "r.yaml: found a list; expected a mapping of settings"),
        ("text", "r.yaml: found 'text'; expected a mapping"),
        ("a: [1", "r.yaml: not YAML"),
        ("a: 1\n---\na: 2", "r.yaml: not YAML"),
        ("a: \0", "r.yaml: not YAML"),
        ("a: " + "[" * 20_000, "nested too deeply"),
        ("a: " + "{b: " * 10_000, "nested too deeply"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "r.yaml")
    assert message in str(error.value)


def test_an_empty_file_sets_nothing():
    assert parse_yaml("# nothing\n", "r.yaml") == {}


def test_the_bomb_is_refused_before_it_is_expanded():
    assert len(BOMB) < 500
    begin = time.process_time()
    with pytest.raises(ConfigError):
        parse_yaml(BOMB, "r.yaml")
    refused = time.process_time() - begin
    begin = time.process_time()
    parse_yaml(BOMB.replace("*", "").replace("&", ""), "r.yaml")
    assert refused < 10 * (time.process_time() - begin)


def test_a_pipe_is_read(tmp_path):
    os.mkfifo(path := tmp_path / "pipe")
    with ThreadPoolExecutor() as threads:
        writing = threads.submit(path.write_text, "k: 8")
        assert load_yaml(path) == {"k": "8"}
        writing.result()


def test_files(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        load_yaml(tmp_path / "absent.yaml")
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff")
    for folder in (tmp_path, path / "x.yaml"):
        with pytest.raises(MissingFileError, match="no such file"):
            load_yaml(folder)
    with pytest.raises(ConfigError, match=r"r.yaml: not YAML \('utf-8' codec"):
        load_yaml(path)
    path.write_text("# " + "x" * LARGEST)
    with pytest.raises(ConfigError, match=f"found more than {LARGEST} bytes; expected at most"):
        load_yaml(path)
