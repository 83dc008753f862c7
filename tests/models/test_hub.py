"""Hub ids through a cache on disk, offline; GGUF folders; files that are damaged, not absent."""

import json
import shutil

import pytest
from helpers_stages import one_line, rollout_argv, write_prompts

from lopd.cli import main
from lopd.errors import DataError, MissingFileError
from lopd.models.hub import local_folder
from lopd.models.load import check_model_folder, load_tokenizer
from lopd.provenance import read_manifest

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch, student_folder):
    """A cache of huggingface_hub that holds org/name at one revision, and no network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(student_folder, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.chdir(tmp_path)
    return repository


@pytest.mark.parametrize("name", ["org/name", "org/name@main", f"org/name@{REVISION}"])
def test_a_hub_id_is_its_snapshot(cache, name):
    assert local_folder(name) == str(cache / "snapshots" / REVISION)


@pytest.mark.parametrize("name", ["org/other", "org/name@v2"])
def test_what_is_not_cached_is_named_offline(cache, name):
    with pytest.raises(MissingFileError, match=f"^{name}: no such folder.*offline.*HF_HUB_OFFLINE"):
        local_folder(name)


def test_paths_stay_paths(cache, tmp_path):
    (tmp_path / "org").mkdir()
    for name in ("org/name", "./org/other", "/org/name", "a/b/c", "name"):
        assert local_folder(name) == name


def test_a_stage_takes_a_hub_id_and_pins_its_revision(cache, tmp_path, capsys):
    argv = rollout_argv("org/name", write_prompts(tmp_path / "p.jsonl"), tmp_path / "rollouts")
    assert main(argv) == 0
    assert read_manifest(tmp_path / "rollouts").model.hub == f"org/name@{REVISION}"
    capsys.readouterr()
    assert main(["inspect", "--path", str(tmp_path / "rollouts")]) == 0
    assert f"org/name@{REVISION} (" in capsys.readouterr().out
    assert main(rollout_argv("org/other", tmp_path / "p.jsonl", tmp_path / "more")) == 2
    assert "offline" in one_line(capsys)


def import_argv(folder, teacher, student):
    lists = [{"7": -0.5, "9": -1.5}, {"8": -0.25, "9": -2.5}]
    record = {"prompt_token_ids": [5, 6], "response_token_ids": [7, 8], "logprobs": lists}
    source = folder / "dump.jsonl"
    source.write_text(json.dumps(record) + "\n")
    argv = ["import", "--source", source, "--format", "topk", "--out", folder / "imported"]
    return [*map(str, argv), "--teacher", teacher, "--student", student]


def test_an_import_takes_hub_ids_and_names_of_models_that_are_nowhere(cache, tmp_path, capsys):
    assert main(import_argv(tmp_path, "org/other", "org/name")) == 0
    manifest = read_manifest(tmp_path / "imported", kind="cache")
    assert manifest.rollouts.model.hub == f"org/name@{REVISION}"
    assert manifest.model.weights == "unidentified: org/other"
    assert "'org/other' is taken as a name" in capsys.readouterr().err


def test_gguf_is_refused_with_the_conversion(tmp_path, capsys):
    file = tmp_path / "model-q8.gguf"
    file.write_bytes(b"GGUF")
    for path in (tmp_path, file):
        with pytest.raises(MissingFileError, match=r"gguf_file='model-q8\.gguf'.*save_pretrained"):
            check_model_folder(path)
    assert main(rollout_argv(file, tmp_path / "p.jsonl", tmp_path / "out")) == 2
    assert "is a GGUF file" in one_line(capsys)
    for path in (str(tmp_path), str(file)):
        assert main(["declare", "--model", path, "--teacher", path]) == 2
        assert "is a GGUF file" in one_line(capsys)
        assert main(import_argv(tmp_path, path, path)) == 2
        assert "is a GGUF file" in one_line(capsys)


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json"])
def test_a_damaged_file_is_not_replaced_by_defaults(tmp_path, student_folder, name):
    folder = tmp_path / "model"
    shutil.copytree(student_folder, folder)
    (folder / name).write_text('{"eos_token_id": ')
    with pytest.raises(DataError, match=f"{name} is not JSON.*restore it"):
        load_tokenizer(folder)
