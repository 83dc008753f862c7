"""Atomic writes: what a killed writer leaves, and who removes it."""

import fcntl

import pytest
from helpers_artefacts import write_pipeline

from lopd.cli import main
from lopd.errors import DataError
from lopd.provenance.io import pretty_json, remove_dead_writers, write_atomic


def test_a_path_that_is_not_utf_8_is_named():
    """As one that was resolved, through a folder that nobody named."""
    assert pretty_json({"path": "/ü"}) == '{\n  "path": "/ü"\n}\n'.encode()
    with pytest.raises(DataError, match=r"/mnt/\\udcff.*: holds bytes that are not UTF-8"):
        pretty_json({"a": 1, "path": "/mnt/\udcff/x"})


def test_only_the_files_of_dead_writers_of_the_same_name_are_removed(tmp_path):
    for name in (".page[1].7.tmp", ".page[1].8.tmp", ".page[1]2.9.tmp", ".other.7.tmp"):
        (tmp_path / name).write_bytes(b"torn")
    with (tmp_path / ".page[1].8.tmp").open("rb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        remove_dead_writers(tmp_path / "page[1]")
    write_atomic(tmp_path / "page[1]", b"whole")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"page[1]", ".page[1].8.tmp", ".page[1]2.9.tmp", ".other.7.tmp"}


def test_a_writer_holds_its_temporary_file(tmp_path, monkeypatch):
    def another_comes(source, target):
        remove_dead_writers(tmp_path / "page")
        assert source.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", lambda descriptor: another_comes(next(tmp_path.iterdir()), 0))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "page", b"whole")
    assert not list(tmp_path.iterdir())


def test_declare_removes_what_a_killed_one_left(tmp_path):
    root = write_pipeline(tmp_path)
    (root / "base").mkdir()
    for file in (root / "teacher").iterdir():
        if file.name != "manifest.json":
            (root / "base" / file.name).write_bytes(file.read_bytes())
    torn = root / "base" / ".manifest.json.7.tmp"
    torn.write_bytes(b"torn")
    assert main(["declare", "--model", str(root / "base"), "--teacher", str(root / "teacher")]) == 0
    assert not torn.exists()
