"""What a path is in messages, and the messages of stages that are given another thing."""

import os

import pytest
from helpers_artefacts import write_pipeline
from helpers_stages import one_line

from lopd.cli import main
from lopd.provenance.found import WRITERS, found_at
from lopd.provenance.manifest import KINDS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_pipeline(tmp_path_factory.mktemp("world"))
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    os.mkfifo(folder / "pipe")
    (folder / "empty").mkdir()
    (folder / "begun").mkdir()
    (folder / "begun" / "recipe.json").write_text("{}")
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("teacher", "is a model folder"),
        ("student", "holds 'checkpoint' of 'lopd sft' or 'lopd distill'"),
        ("rollouts", "holds 'rollouts' of 'lopd rollout' or 'lopd import'"),
        ("cache", "holds 'cache' of 'lopd score' or 'lopd import'"),
        ("prompts.jsonl", "is a file"),
        ("pipe", "is a pipe or a device, which can be read only once"),
        ("empty", "is an empty folder"),
        ("begun", "holds a training run that is not finished"),
        ("other", "is a folder of something else"),
        ("nowhere", "no such file or folder"),
        ("teachr", "no such file or folder, did you mean '{}/teacher'?"),
        ("nowhere/teacher", "no such file or folder"),
    ],
)
def test_every_kind_of_path_has_words(world, name, words):
    assert found_at(world / name) == words.format(world)


def test_every_kind_of_artefact_has_a_writer():
    assert tuple(WRITERS) == KINDS


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("rollout --student cache --prompts prompts.jsonl", "cache: holds 'cache' of 'lopd score'"),
        (
            "rollout --student prompts.jsonl --prompts prompts.jsonl",
            "prompts.jsonl: is a file",
        ),
        ("rollout --student studnet --prompts prompts.jsonl", "did you mean"),
        ("rollout --student student --prompts teacher", "teacher: is a model folder; expected a J"),
        ("rollout --student student --prompts rollouts", "rollouts: holds 'rollouts' of"),
        ("rollout --student student --prompts prompt.jsonl", "did you mean"),
        (
            "score --teacher teacher --rollouts teacher",
            "a model folder; it has no manifest",
        ),
        ("score --teacher teacher --rollouts cache", "name a folder that 'lopd rollout' or"),
        ("distill --student student --cache rollouts", "name a folder that 'lopd score' or"),
        ("distill --student cache --cache student", "cache: holds 'cache' of 'lopd score'"),
        ("eval --model student --prompts cache", "cache: holds 'cache' of"),
        ("sft --model rollouts --data prompts.jsonl", "rollouts: holds 'rollouts' of"),
    ],
)
def test_a_folder_in_the_place_of_another_is_named_for_what_it_is(
    world, tmp_path, capsys, argv, words
):
    named = [str(world / word) if i % 2 else word for i, word in enumerate(argv.split()[1:])]
    assert main([argv.split()[0], *named, "--out", str(tmp_path / "out")]) == 2
    assert words in one_line(capsys)
    assert not (tmp_path / "out").exists()
