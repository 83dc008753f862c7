"""Output folders: every state, and the message of each refusal."""

import os

import pytest
from helpers_cache import make_manifest, write_cache

from lopd.errors import ConfigError, ShardError
from lopd.provenance import io, write_manifest
from lopd.store.folders import examine_folder, examine_shard_folder, writing_to
from lopd.store.locks import FolderLock


def examine(folder, differs="", has_results=True):
    return examine_folder(
        folder,
        final="final.json",
        record="record.json",
        differs=lambda: differs,
        has_results=lambda: has_results,
        allowed_files={"mine.txt"},
    )


@pytest.mark.parametrize("name", [None, ".lock", ".start.lock", ".record.json.7.tmp", "mine.txt"])
def test_a_folder_without_foreign_files_is_new(tmp_path, name):
    if name is not None:
        (tmp_path / name).write_text("")
    for folder in (tmp_path, tmp_path / "not" / "there"):
        assert examine(folder).require_writable().state == "new"
    assert not (tmp_path / "not").exists()


def test_a_run_with_the_same_identity_is_unfinished(tmp_path):
    (tmp_path / "record.json").write_text("{}")
    (tmp_path / "checkpoint-1").mkdir()
    assert examine(tmp_path).require_writable().state == "unfinished"


def test_another_recipe_is_replaced_only_if_it_has_no_results(tmp_path):
    (tmp_path / "record.json").write_text("{}")
    assert examine(tmp_path, "k was 8, is 4", has_results=False).require_writable().state == "new"
    with pytest.raises(ConfigError, match=r"holds another recipe \(k was 8, is 4\); restore that"):
        examine(tmp_path, "k was 8, is 4").require_writable(ShardError)


def test_a_finished_run_is_never_overwritten(tmp_path):
    for name in ("record.json", "final.json", "notes.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match="holds a finished run; choose another --out"):
        examine(tmp_path, "k was 8, is 4").require_writable(ShardError)


@pytest.mark.parametrize("name", ["notes.txt", "notes.tmp", ".gitattributes"])
def test_foreign_files_are_named(tmp_path, name):
    (tmp_path / name).write_text("")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ShardError, match=f"holds {name} and no record.json; choose a new or empty"):
        examine(tmp_path).require_writable(ShardError)
    assert examine_folder(tmp_path, allowed_files=None).state == "new"


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=rf"{tmp_path / 'file'} is a file; choose another"):
            examine(out).require_writable()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path} cannot be written to; choose another"):
        examine(tmp_path / "out").require_writable()
    message = r"cannot be made or written \(No space left"
    with pytest.raises(ShardError, match=message), writing_to(tmp_path):
        raise OSError(28, "No space left on device")


def test_a_recipe_in_use_by_other_workers_is_not_replaced(tmp_path):
    write_cache(tmp_path, make_manifest())
    for shard in tmp_path.glob("shard-*"):
        shard.unlink()
    other = make_manifest(k=4)
    assert examine_shard_folder(tmp_path, other).state == "new"
    assert examine_shard_folder(tmp_path, make_manifest(), in_use=True).state == "unfinished"
    with pytest.raises(ConfigError, match=r"holds another recipe \(k was 8, is 4\)"):
        examine_shard_folder(tmp_path, other, in_use=True)


def test_keys_without_a_value_and_what_older_artefacts_do_not_record_make_no_other_recipe(tmp_path):
    """The manifest on disk stays, with its digest."""
    manifest = make_manifest()
    write_cache(tmp_path, manifest)
    model = {"behaviour": {"config": {"rope_theta": 1}}, "eos_ids": [1]}
    assert examine_shard_folder(tmp_path, make_manifest(note=None)).state == "unfinished"
    assert examine_shard_folder(tmp_path, make_manifest(model=model)).state == "unfinished"


def test_a_recorded_behaviour_is_compared(tmp_path):
    write_cache(tmp_path, make_manifest(model={"behaviour": {"config": {"rope_theta": 1}}}))
    changed = {"behaviour": {"config": {"rope_theta": 2}}}
    with pytest.raises(ConfigError, match=r"model\.behaviour\.config\.rope_theta was 1, is 2"):
        examine_shard_folder(tmp_path, make_manifest(model=changed))


def test_a_folder_of_another_kind_is_not_called_a_finished_run(tmp_path):
    write_cache(tmp_path, make_manifest())
    for folder in (
        examine_folder(tmp_path, final="manifest.json", kind="checkpoint"),
        examine_folder(tmp_path, record="manifest.json", kind="rollouts"),
    ):
        message = "holds 'cache' of 'lopd test'; choose a new or empty folder"
        with pytest.raises(ConfigError, match=message):
            folder.require_writable()
    assert examine_folder(tmp_path, final="manifest.json", kind="cache").state == "finished"


def test_the_next_holder_of_the_lock_removes_what_killed_writers_left(tmp_path):
    left = [tmp_path / name for name in (".manifest.json.7.tmp", ".shard-00001.lock")]
    for path in left:
        path.write_text("")
    (tmp_path / "mine.tmp").write_text("")
    first = FolderLock(tmp_path, shared=True)
    assert not any(path.exists() for path in left) and (tmp_path / "mine.tmp").exists()
    first.share()
    left[0].write_text("")  # of a writer that is running
    FolderLock(tmp_path, shared=True).release()
    assert left[0].exists()


def test_folders_are_made_durably_from_the_top(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(io, "sync_folder", lambda folder: synced.append(folder))
    io.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    io.make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2


def test_a_manifest_that_another_worker_writes_meanwhile_is_no_foreign_file(tmp_path, monkeypatch):
    from lopd.store import folders

    names = folders._names

    def another_begins(folder):
        found = names(folder)
        write_manifest(tmp_path, make_manifest())
        return found

    monkeypatch.setattr(folders, "_names", another_begins)
    assert examine_shard_folder(tmp_path, make_manifest(), in_use=True).state == "unfinished"
