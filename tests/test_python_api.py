"""The pipeline from Python: the example of docs/python.md, and its types."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typed_lopd

import lopd

ROOT = Path(__file__).parents[1]


def test_the_example_runs(teacher_folder, student_folder, tmp_path, monkeypatch, capsys):
    """On models of two layers, with answers of 6 tokens and 2 steps of training."""
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    for config in ("SftDataConfig(", "RolloutConfig(", "EvalConfig("):
        example = example.replace(config, f"{config}max_new_tokens=6, dtype='float32', ")
    example = example.replace("max_steps=500", "max_steps=2").replace("num_epochs=2", "max_steps=2")
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(teacher_folder)
    Path("base").symlink_to(student_folder)
    texts = [f"the {a} {b}" for a in ("cat", "dog") for b in ("sat", "ran")]
    records = [json.dumps({"prompt": text, "answer": "1"}) for text in texts]
    for name in ("sft", "opd", "test"):
        Path(f"{name}.jsonl").write_text("\n".join(records))
    exec(compile(example, "docs/python.md", "exec"), {})
    assert re.search(r"^4 sequences scored by .*teacher", capsys.readouterr().out, re.MULTILINE)
    assert json.loads(Path("eval/results.json").read_text())["kl"]["nats_per_token"] > 0


@pytest.mark.thorough
def test_the_typed_examples_name_every_public_name_and_pass_mypy_strictly():
    assert set(lopd.__all__) <= set(vars(typed_lopd))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "pyproject.toml"]
    done = subprocess.run(
        [*command, "--follow-imports=silent", "tests/typed_lopd.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "Success" in done.stdout, done.stdout + done.stderr
