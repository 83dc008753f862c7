"""The command line: commands, help, and errors in one line."""

import pytest

from lopd.cli import COMMANDS, main, split_config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--a", "1"], (None, ["--a", "1"])),
        (["--a", "1", "--config", "f.yaml", "--b"], ("f.yaml", ["--a", "1", "--b"])),
        (["--config=f.yaml", "--b=2"], ("f.yaml", ["--b=2"])),
    ],
)
def test_config_file_is_accepted_anywhere(words, expected):
    assert split_config(words, "sft") == expected


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_describes_its_flags(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["rolout"], "unknown command 'rolout'; did you mean 'rollout'?"),
        (["rollout", "--config"], "--config needs a file"),
        (["run", "absent.yaml"], "absent.yaml: no such file"),
        (
            ["rollout", "--student", "absent", "--prompts", "p", "--out", "o"],
            "absent: no such folder",
        ),
    ],
)
def test_errors_are_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_rehash_clears_stored_fingerprints(teacher_folder, tmp_path, monkeypatch):
    from lopd.provenance import fingerprint, fingerprint_weights

    monkeypatch.setattr(fingerprint, "_RACY_NS", -1)  # however recently a file was written
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fingerprint_weights(teacher_folder)
    (memo,) = (file for file in tmp_path.rglob("*") if file.is_file())
    memo.write_text(memo.read_text().replace(fingerprint_weights(teacher_folder), "0" * 64))
    assert fingerprint_weights(teacher_folder) == "0" * 64
    declared = ["declare", "--model", str(teacher_folder), "--teacher", "absent"]
    assert main([*declared, "--rehash"]) == 2
    assert fingerprint_weights(teacher_folder) != "0" * 64
