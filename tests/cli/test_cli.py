"""The command line: commands, errors in one line, output and exit codes."""

import os
import shlex
import subprocess
import sys

import pytest

from lopd.cli import main, missing_package
from lopd.cli.commands import COMMANDS


@pytest.fixture
def built(monkeypatch):
    """Configs as `lopd` builds them; no stage runs."""
    found = []

    class Stage:
        main = staticmethod(found.append)

    monkeypatch.setattr("lopd.cli._stage", lambda name, quiet: Stage)
    return found


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rolout"], "lopd: error: unknown command 'rolout'; did you mean 'rollout'?"),
        (["rollout", "--config"], "Option '--config' requires an argument"),
        (["rollout", "--tempratur", "1"], "unknown flag '--tempratur'; did you mean '--temp"),
        (["rollout", "--xyz"], "unknown flag '--xyz'; see lopd rollout --help"),
        (["rollout", "stray"], "extra argument (stray); write --NAME or"),
        (
            ["distill", "--keep_best=yes"],
            "not take a value; write --NAME or --no-NAME for",
        ),
        (["rollout", "--student", "s"], "lopd rollout: error: missing --prompts (JSONL"),
        (["run", "absent.yaml"], "absent.yaml: no such file"),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        (["inspect", "absent"], "absent: no such file or folder; name a folder that a lopd stage"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


@pytest.mark.parametrize(
    "flags",
    [
        "--max-new-tokens 3 --top-p 0.5",
        "--max_new_tokens 3 --top_p 0.5",
        "--max_new_tokens=3 --top-p=0.5",
        "--config file.yaml --max-new-tokens 3",
        "--config=file.yaml --max-new-tokens=3",
    ],
)
def test_both_spellings_of_a_flag(flags, built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text("top-p: 0.5\nmax_new_tokens: 9\n")
    assert main(["rollout", *shlex.split(f"--student s --prompts p --out o {flags}")]) == 0
    (config,) = built
    assert (config.max_new_tokens, config.top_p, config.temperature) == (3, 0.5, 1.0)


def test_switches_in_both_directions(built, tmp_path):
    paths = shlex.split("distill --student s --cache c --out o")
    (tmp_path / "d.yaml").write_text("keep_best: true\nholdout: 0.1\nverify: true\n")
    file = ["--config", str(tmp_path / "d.yaml")]
    words = {
        "": (True, True),
        "--no_keep_best": (False, True),
        "--no-keep-best --no_verify": (False, False),
        "--verify": (True, True),
        "--keep_best=False --verify=true": (False, True),
        "--keep-best false --verify False --holdout 0": (False, False),
    }
    for flags in words:
        assert main([*paths, *file, *shlex.split(flags)]) == 0
    assert [(config.keep_best, config.verify) for config in built] == [*words.values()]


def test_a_folder_or_a_recipe_needs_no_flag(built):
    for argv in (["inspect", "x"], ["inspect", "--path", "x"], ["run", "x"], ["sft_data"]):
        main(argv)
    assert [vars(config) for config in built] == [
        {"path": "x", "verify": False, "json": False},
        {"path": "x", "verify": False, "json": False},
        {"recipe": "x"},
    ]


def test_rehash_clears_stored_fingerprints(teacher_folder, tmp_path, monkeypatch):
    from lopd.provenance import fingerprint_weights

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("lopd.provenance.fingerprint._RACY_NS", 0)  # remember new files too
    os.utime(teacher_folder / "model.safetensors", (1e9, 1e9))
    fingerprint_weights(teacher_folder)
    (memo,) = (file for file in tmp_path.rglob("*") if file.is_file())
    memo.write_text(memo.read_text().replace(fingerprint_weights(teacher_folder), "0" * 64))
    assert fingerprint_weights(teacher_folder) == "0" * 64
    declared = ["declare", "--model", str(teacher_folder), "--teacher", "absent"]
    assert main([*declared, "--rehash"]) == 2
    assert fingerprint_weights(teacher_folder) != "0" * 64


@pytest.mark.parametrize(
    ("package", "extra"), [("transformers", "train"), ("math_verify", "eval"), ("pyarrow", None)]
)
def test_a_missing_package_comes_with_its_remedy(package, extra):
    error = ModuleNotFoundError(f"No module named '{package}'", name=f"{package}.utils")
    assert missing_package(error).endswith(f'pip install "lopd[{extra or "parquet"}]"')
    assert missing_package(ModuleNotFoundError("No module named 'x'", name="x")) == (
        "No module named 'x'"
    )


PRINTING = """
import sys, lopd.cli
class Stage:
    main = staticmethod(print)
lopd.cli._stage = lambda name, quiet: Stage
sys.exit(lopd.cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "x"]])
def test_a_closed_pipe_is_quiet(argv):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", PRINTING, *argv], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


WRITING = """
import os, sys, lopd.cli
class Stage:
    def main(config):
        with open(config.path, "w") as file:
            os.write(2, b"message")
            print(sys.stdout.isatty(), "\\u00b1 0.1")
            print("\\u00b1", file=sys.stderr)
            file.write("data")
lopd.cli._stage = lambda name, quiet: Stage
sys.exit(lopd.cli.main(["inspect", sys.argv[1]]))
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_standard_streams_may_be_closed(closed, tmp_path):
    """As those of a daemon's children; the next open file would take their place."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", WRITING, str(out)]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    assert subprocess.run(shell, capture_output=True).returncode == 0
    assert out.read_text() == "data"


def test_characters_that_an_encoding_lacks_are_escaped(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", WRITING, str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"False \\xb1 0.1\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollouts", "r\udcff"], "rollouts: found 'r\\udcff', whose bytes are not UTF-8"),
        (["--teacher", "a=\udcff", "--teacher", "b=t"], "teacher: found '\\udcff', whose bytes"),
        (["--out=~/o"], "out: found '~/o', which is a folder named ~ here: only shells"),
        (["--out", "o\r"], "out: found 'o\\r', which ends with a carriage return; give the scr"),
    ],
)
def test_names_of_what_is_not_meant_are_refused_at_once(flags, message, built, capsys):
    several = ["--teacher-field", "task", "--teacher", "c=t"]
    assert main(["score", "--rollouts", "r", "--out", "o", *several, *flags]) == 2
    assert message in capsys.readouterr().err and not built


EXAMPLES = [
    pytest.param(name, example, id=f"{name}-{number}")
    for name, about in COMMANDS.items()
    for number, example in enumerate(about.examples)
]


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_examples_of_the_help_are_valid(name, example, built, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distill.yaml").write_text("student: s\ncache: c\nout: o\n")
    assert main([name, *shlex.split(example)]) == 0
    assert type(built[0]) is COMMANDS[name].config_class()
