"""Commands of the benchmarks on tiny models: the whole path of each, on the real stages."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_demo import TINY, TinyRealDemo, shrink_toy_demo

from benchmarks import (
    criteria,
    demo_seeds,
    families,
    figures,
    gradients,
    objectives,
    plans,
    prunings,
    qwen3,
    readme,
    real_model,
    roofline,
)
from benchmarks.live_runs import SIZES, Bench
from lopd.provenance import read_manifest
from lopd.stages.demo.toy import TASK

ROOT = Path(__file__).parents[2]


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.thorough
def test_demos_of_several_seeds_are_measured(tmp_path, monkeypatch, capsys):
    shrink_toy_demo(monkeypatch)
    assert demo_seeds.main(["--seeds", "0", "--out", str(tmp_path)]) == 1  # nobody learns so soon
    rows = rows_of(tmp_path / demo_seeds.NAME)
    assert [row["stage"] for row in rows] == list(TASK.costs)
    assert "seed 0: at least 0.93" in capsys.readouterr().out
    assert "Committed → again" in demo_seeds.against_committed(rows)


@pytest.mark.thorough
def test_prunings_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prunings.PruningDemo, "task", replace(TINY, held_out=None))
    monkeypatch.setattr(prunings.PruningDemo, "load_teacher", TinyRealDemo.load_teacher)
    monkeypatch.setattr(prunings, "LAYERS", range(3))
    monkeypatch.setattr(prunings, "PRUNINGS", {"first": [0], "last two": [1, 2]})
    folder = tmp_path / "models"
    prunings.main(["--steps", "1", "--folder", str(folder), "--out", str(tmp_path)])
    rows = rows_of(tmp_path / prunings.NAME)
    assert [(row["variant"], row["layers"]) for row in rows] == [("first", 2), ("last two", 1)]
    assert "After 1 steps" in capsys.readouterr().out


@pytest.mark.thorough
def test_a_family_is_reported(tmp_path):
    page = tmp_path / "models.md"
    assert families.main(["llama", "--out", str(page)]) == 0
    assert "## Every stage\n\nllama.\n" in page.read_text(encoding="utf-8")


@pytest.mark.thorough
def test_the_real_model_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "BUDGET_S", 0.0)
    assert real_model.main(["--tiny", "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "| reverse KL, fused |" in real_model.table(rows_of(tmp_path / real_model.NAME))


@pytest.mark.thorough
def test_a_live_teacher_and_its_student_are_those_of_the_demo(tmp_path, monkeypatch):
    """Of the size `toy`; the others have random models."""
    shrink_toy_demo(monkeypatch)
    size = replace(SIZES["quick"], shapes=None, steps=2, prompts=8)
    bench = Bench(tmp_path / "bench", size, "cpu", 0)
    live = bench.run(bench.score(bench.roll_out("rollouts", size.prompts), "cache"), "live", 1)
    assert live.renewed["windows"] == size.steps
    assert read_manifest(bench.student).raw["stage"] == "sft"


@pytest.mark.thorough
def test_memory_is_planned(tmp_path, monkeypatch, capsys):
    toy = replace(qwen3.MODELS["0.6B"], **qwen3.TOY)
    monkeypatch.setattr(plans, "MODELS", {"toy": toy})
    plans.main(["--out", str(tmp_path)])
    adamw, adafactor, lora = rows_of(tmp_path / plans.NAME)
    frozen = 2 * (lora["weights"] - lora["gradients"])  # in the bytes of float32
    assert frozen == pytest.approx(adamw["weights"], rel=0.01)  # buffers stay in float32
    assert adamw["weights"] == adafactor["weights"]
    assert adamw["optimizer"] > adafactor["optimizer"] > 0 < lora["optimizer"]
    assert f"| Qwen3-toy | {adamw['total'] / plans.GIB:.1f} |" in capsys.readouterr().out


def test_gradients_are_enumerated(tmp_path, monkeypatch, capsys):
    for name, value in {"VOCAB": 30, "SEEDS": range(2), "LISTS": (4,)}.items():
        monkeypatch.setattr(gradients, name, value)
    gradients.main(["--out", str(tmp_path)])
    assert len(rows_of(tmp_path / gradients.NAME)) == len(gradients.FORMS) * len(gradients.DRIFTS)
    assert "| unbiased |" in capsys.readouterr().out


def test_tables_of_rows_are_written(tmp_path, monkeypatch, capsys):
    document, suite = tmp_path / "README.md", tmp_path / "rows.jsonl"
    document.write_text("<!-- roofline -->\n<!-- end -->\n", encoding="utf-8")
    monkeypatch.setattr(readme, "DOCUMENTS", [document])
    readme.main()
    roofline.main([])
    assert capsys.readouterr().out.strip() in document.read_text(encoding="utf-8")
    suite.write_text("", encoding="utf-8")
    criteria.main([str(suite)])
    assert "| criterion | measured | verdict |" in capsys.readouterr().out
    figures.main([str(suite), "--out", str(tmp_path)])
    objectives.main([objectives.PART], ["--plan", "--out", str(tmp_path)])
    assert f"{len(objectives.PART.cells())} cells, " in capsys.readouterr().out


def test_every_command_is_run_by_a_test():
    """Otherwise a change of what it calls is noticed when its rows are next needed."""
    commands = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    files = (ROOT / "tests").rglob("test_*.py")
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    calls = re.findall(r"\b(\w+)\.main\(", tests)
    processes = re.findall(r'"-m", "benchmarks\.(\w+)"', tests)
    assert commands - {*calls, *processes} == set()
