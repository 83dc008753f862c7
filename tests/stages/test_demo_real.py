"""The demo on a real model: its driver with tiny random models, and the real one (slow)."""

import importlib.util
import json

import pytest
import torch
from helpers_demo import TINY, TinyRealDemo, tiny_llama
from helpers_stages import one_line

from benchmarks import real_demo
from lopd.cli import main
from lopd.evaluation.grading import exact_grader
from lopd.stages import demo as demos
from lopd.stages.demo import smollm2
from lopd.stages.demo.driver import measures
from lopd.stages.demo.questions import ANSWER_REGEX, all_questions, split_questions
from lopd.stages.demo.real import DISTILLED, SHOWN, TASK, UNBIASED
from lopd.stages.demo.report import FINE_TUNED, MORE_SFT, real_conclusion


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "demo"
    assert run_tiny(folder) == 0
    return folder


def run_tiny(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(demos.TASKS, "smollm2", TinyRealDemo)
        return main(["demo", "--task", "smollm2", "--out", str(folder), "--online"])


@pytest.fixture(scope="module")
def rows(out):
    return {row["stage"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


@pytest.mark.thorough
def test_every_model_is_measured(rows):
    assert set(rows) == set(TASK.costs)
    for name in ("teacher", FINE_TUNED, DISTILLED, UNBIASED, MORE_SFT):
        row = rows[name]
        for key in ("kl", "held_out_kl", "greedy", "sampled"):
            low, high = row[f"{key}_interval"]
            assert low <= row[key] + 1e-6 and row[key] <= high
    assert rows["teacher"]["kl"] < 1e-5 < rows[FINE_TUNED]["kl"]
    assert all(row["peak_mib"] > 100 for row in rows.values() if row["seconds"] is not None)


@pytest.mark.thorough
def test_finished_demo_prints_table_and_answers_again(out, capsys):
    assert run_tiny(out) == 0
    printed = capsys.readouterr().out
    assert "held-out KL" in printed and "peak MiB" in printed
    for name in SHOWN:
        assert f" {name} " in printed
    assert f"{TINY.steps} steps took the KL to the teacher from" in printed
    assert "[1/" not in printed


@pytest.mark.thorough
def test_the_benchmark_has_rows_and_tables_of_a_finished_demo(out, tmp_path, monkeypatch):
    monkeypatch.setitem(demos.TASKS, "smollm2", TinyRealDemo)
    real_demo.main(["--folder", str(out), "--out", str(tmp_path)])
    lines = (tmp_path / real_demo.NAME).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["stage"] for row in rows} == {*TASK.costs, real_demo.ANSWERS}
    for table in (
        real_demo.table, real_demo.short_table, real_demo.against_control, real_demo.parts,
        real_demo.answers,
    ):  # fmt: skip
        assert table(rows).count("\n|") >= 3


@pytest.mark.thorough
def test_another_task_does_not_take_the_folder(out, capsys):
    assert main(["demo", "--out", str(out)]) == 2
    assert "holds another recipe (task was 'smollm2', is 'arithmetic')" in one_line(capsys)


@pytest.mark.thorough
def test_report_works_on_the_result(out, tmp_path):
    argv = ["report", str(out / "distill"), str(out / "more-sft")]
    argv += ["--evals", str(out / "eval" / "distill"), "--out", str(tmp_path / "report.html")]
    assert main(argv) == 0
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.thorough
def test_the_student_is_the_teacher_without_its_layers(out):
    from transformers import AutoModelForCausalLM

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(out / name) for name in ("teacher", "student-init")
    )
    assert student.config.num_hidden_layers == 2
    for mine, theirs in ((0, 0), (1, 2)):
        for one, other in zip(
            student.model.layers[mine].parameters(),
            teacher.model.layers[theirs].parameters(),
            strict=True,
        ):
            assert torch.equal(one, other)
    ids = torch.arange(5)[None]
    cached = student(ids[:, :4], use_cache=True)
    step = student(ids[:, 4:], past_key_values=cached.past_key_values).logits
    assert torch.allclose(step, student(ids).logits[:, 4:], atol=1e-5)


def test_the_sharpened_teacher_is_the_model_at_that_temperature():
    model = tiny_llama()
    ids = torch.arange(5)[None]
    with torch.no_grad():
        logits = model(ids).logits
        smollm2.sharpen(model, 0.5)
        assert torch.allclose(model(ids).logits, logits / 0.5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("absent", [smollm2.PACKAGE, "gguf"])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, capsys, monkeypatch, absent):
    package = tmp_path / "site" / smollm2.PACKAGE
    package.mkdir(parents=True)
    (package / smollm2.FILE).write_bytes(b"")
    (package / "__init__.py").write_text("raise AssertionError('not to be imported')")
    monkeypatch.syspath_prepend(package.parent)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        smollm2, "find_spec", lambda name: found("json" if name == "gguf" else name)
    )
    assert smollm2.find_gguf() == package / smollm2.FILE
    monkeypatch.setattr(
        smollm2, "find_spec", lambda name: None if name == absent else found("json")
    )
    assert main(["demo", "--task", "smollm2", "--out", str(tmp_path / "demo")]) == 2
    error = one_line(capsys)
    assert "it is not installed" in error and smollm2.INSTALL in error


def test_questions_are_distinct_and_sets_do_not_overlap():
    questions = [question for question, _ in all_questions()]
    assert len(questions) == len(set(questions)) > 600
    sets = split_questions(TASK.sets, seed=0)
    drawn = [question for pairs in sets.values() for question, _ in pairs]
    assert len(drawn) == len(set(drawn)) == sum(TASK.sets.values())
    assert sets == split_questions(TASK.sets, seed=0) != split_questions(TASK.sets, seed=1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The capital of Iraq is Baghdad, a city.", "Baghdad"),
        ("Nepal is in Asia.", "Asia"),
        ("Spain is located in Europe, while America is not.", "Europe"),
        ("The opposite of 'long' is 'short', which is a word.", "short"),
        ("5 * 3 = 15.\n\nThis is a product.", "15"),
        ("Baghdad", None),
    ],
)
def test_answers_are_read_from_sentences(text, answer):
    assert exact_grader(ANSWER_REGEX)(text, "")[0] == answer


def test_every_answer_can_be_read():
    grade = exact_grader(ANSWER_REGEX)
    for question, answer in all_questions():
        assert grade(f"The answer is {answer}.", answer) == (answer, True), question


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.1, 0.2, "below the"),
        (0.8, 0.9, "above the"),
        (0.4, 0.6, "not distinguishable from the"),
    ],
)
def test_the_conclusion_says_what_the_intervals_say(low, high, words):
    def row(name, *interval):
        return {"stage": name, "kl": sum(interval) / 2, "kl_interval": interval, "sampled": 0.5}

    rows = [row("teacher", 0, 0), row(FINE_TUNED, 1, 2), row(MORE_SFT, 0.5, 0.7)]
    best = row(DISTILLED, low, high)
    assert words in real_conclusion([*rows, best], 3)
    del best["kl_interval"]
    assert "not compared, for want of intervals, with the" in real_conclusion([*rows, best], 3)


def test_a_kl_without_a_standard_error_has_no_interval():
    rate = {"mean": 0.5, "low": 0.2, "high": 0.8}
    kl = {"nats_per_token": 0.1, "standard_error": 0.1}
    results = {"greedy": rate, "avg@2": rate, "kl": kl, "cache_kl": {"nats_per_token": 0.3}}
    row = measures(results, 2)
    assert row["kl_interval"] == [0.0, pytest.approx(0.296, abs=1e-3)]
    assert row["held_out_kl"] == 0.3 and "held_out_kl_interval" not in row
    assert row["sampled_interval"] == [0.2, 0.8]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(smollm2.PACKAGE) is None or importlib.util.find_spec("gguf") is None,
    reason=f"needs SmolLM2: {smollm2.INSTALL}",
)
def test_distillation_brings_smollm2s_student_nearer_to_it(tmp_path):
    assert main(["demo", "--task", "smollm2", "--out", str(tmp_path / "demo")]) == 0
    results = json.loads((tmp_path / "demo/results.json").read_text())
    rows = {row["stage"]: row for row in results["rows"]}
    assert rows["teacher"]["sampled"] > 0.2
    assert rows[DISTILLED]["kl_interval"][1] < rows[FINE_TUNED]["kl_interval"][0]
