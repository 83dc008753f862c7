"""The demo on one seed: its results, and the use of its artefacts by the stage commands."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers_stages import one_line

from lopd.cli import main
from lopd.stages.demo import arithmetic as toy
from lopd.stages.demo.figure import before_after, draw, set_scale
from lopd.stages.demo.report import (
    CLIPPED,
    DISTILLED,
    FINE_TUNED,
    IN_WORDS,
    MORE_SFT,
    SAMPLED,
    format_table,
)
from lopd.stages.demo.toy import TASK, ToyDemo
from lopd.training.logging import LOG_NAME


def test_solutions_and_tokenizer():
    assert toy.solve("3+5*2-7*4=") == ("3+5=8;8*2=6;6-7=9;9*4=6;#6", "6")
    tokenizer = toy.build_tokenizer()
    solution, _ = toy.solve("3+5*2-7*4=")
    ids = tokenizer(solution)["input_ids"]
    assert len(ids) == len(solution) and tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids) == solution
    assert len(tokenizer) == 28


def test_prompt_sets_do_not_overlap():
    seen: set[str] = set()
    first = toy.sample_prompts(200, 1, exclude=seen)
    second = toy.sample_prompts(200, 1, exclude=seen)
    assert len(set(first) | set(second)) == 400 == len(seen)
    assert toy.sample_prompts(200, 1, exclude=set()) == first


def test_curves_skip_log_records_without_the_metric(tmp_path):
    (tmp_path / "online").mkdir()
    records = [
        {"step": 0, "generation_seconds": 1.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.4},
    ]
    log = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "online" / LOG_NAME).write_text(log)
    draw(tmp_path, [], TASK.titles, TASK.curves, TASK.live)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


ROWS = [
    {"stage": "teacher", "sampled": 0.99, "sampled_interval": [0.98, 0.995], "kl": 0.0},
    {"stage": "teacher's answers"},
    {"stage": FINE_TUNED, "sampled": 0.68, "sampled_interval": [0.65, 0.71], "kl": 0.16},
    {"stage": DISTILLED, "sampled": 0.97, "sampled_interval": [0.96, 0.98], "kl": 0.006},
    {"stage": MORE_SFT, "sampled": 0.95, "kl": 0.01},  # as earlier versions wrote it
]


@pytest.mark.parametrize("key", ["sampled", "kl"])
def test_the_picture_shows_each_model_before_and_after(key):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    measured = {row["stage"]: row for row in ROWS if "sampled" in row}
    before_after(axes, measured, key, "title", "label", TASK.live, TASK.titles.models)
    names = [IN_WORDS[DISTILLED], IN_WORDS[MORE_SFT]]
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    levels = {"student,\nfine-tuned"} | ({"teacher"} if key == "sampled" else set())
    assert levels <= {text.get_text() for text in axes.texts}
    drawn = [tuple(line.get_xdata()) for line in axes.lines]
    start, end = measured[FINE_TUNED][key], measured[DISTILLED][key]
    assert (start, end) in drawn and (start, start) in drawn
    assert ((0.99, 0.99) in drawn) == (key == "sampled")  # the teacher's KL to itself is 0
    assert ((0.96, 0.98) in drawn) == (key == "sampled")


@pytest.mark.parametrize(
    ("values", "wide", "labels"),
    [
        ((1.64, 1.25, 1.34), False, 3),  # a log axis labels 1.3, 1.4, ... over each other
        ((0.9, 1.1), False, 3),
        ((0.16, 0.001, 0.02), True, 3),
        ((0.11, 0.0098), True, 2),
        ((3e-5, 1.5, 0.0), True, 3),
    ],
)
@pytest.mark.parametrize("name", ["x", "y"])
def test_labels_of_an_axis_do_not_cover_each_other(values, wide, labels, name):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.8))
    axes = figure.subplots()
    axes.plot(*((values, range(len(values))) if name == "x" else (range(len(values)), values)))
    assert set_scale(axes, name, values) is wide
    figure.draw_without_rendering()
    axis, (low, high) = getattr(axes, f"{name}axis"), getattr(axes, f"get_{name}lim")()
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks if tick.label1.get_text()]
    assert len(boxes) >= labels
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert not any(tick.label1.get_text() for tick in axis.get_minor_ticks())


def test_names_of_near_levels_do_not_cover_each_other():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.8))
    axes = figure.subplots()
    measured = {row["stage"]: row for row in ROWS if "sampled" in row}
    measured[FINE_TUNED] = measured[FINE_TUNED] | {"sampled": 0.985}
    before_after(axes, measured, "sampled", "title", "label", TASK.live, TASK.titles.models)
    figure.draw_without_rendering()
    names = [text for text in axes.texts if text.get_text() in ("teacher", "student,\nfine-tuned")]
    first, second = (text.get_window_extent() for text in names)
    assert not first.overlaps(second)


def test_the_table_has_intervals():
    table = format_table(ROWS).splitlines()
    assert "0.970 ± 0.010" in table[5] and "0.990 ± 0.010" in table[2]
    assert "0.950 |" in table[6] and "±" not in table[6]


def test_online_run_refreshes_at_every_step(tmp_path):
    """Its other settings are those of the offline run, so that the two can be compared."""
    demo = ToyDemo(tmp_path / "demo", seed=0)
    stages = {stage.folder: stage.config for stage in demo.stages(online=True)}
    offline, online = asdict(stages["distill"]), asdict(stages["online"])
    live = {"out": str(demo.out / "online"), "refresh_every": 1, "teacher": demo.path("teacher")}
    assert {key: value for key, value in online.items() if value != offline[key]} == live


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(out), "--seed", "0"]) == 0
    return out


@pytest.fixture(scope="module")
def rows(demo):
    return {row["stage"]: row for row in json.loads((demo / "results.json").read_text())["rows"]}


@pytest.mark.thorough
def test_distillation_reaches_the_teacher(rows):
    start, end = rows[FINE_TUNED], rows[DISTILLED]
    assert rows["teacher"]["sampled"] >= 0.95
    assert 0.5 <= start["sampled"] <= 0.93
    assert end["sampled"] >= max(0.93, start["sampled"] + 0.05)
    assert end["kl"] <= 0.35 * start["kl"]
    assert {"greedy", "sampled", "kl"} <= set(rows[MORE_SFT])


@pytest.mark.thorough
def test_clipping_helps_the_sampled_token_objective(rows):
    start, clipped = rows[FINE_TUNED], rows[CLIPPED]
    assert clipped["sampled"] >= start["sampled"] + 0.02
    assert clipped["kl"] <= 0.8 * start["kl"]
    assert rows[DISTILLED]["kl"] < min(clipped["kl"], rows[SAMPLED]["kl"])


@pytest.mark.thorough
def test_table_has_a_row_for_every_stage(rows, demo):
    table = format_table(list(rows.values()))
    assert all(f"| {name}" in table for name in rows)
    assert (demo / "curves.png").stat().st_size > 10_000


@pytest.mark.thorough
def test_results_have_versions_and_intervals(demo, rows):
    results = json.loads((demo / "results.json").read_text())
    assert {"python", "torch", "transformers", "lopd"} <= results["environment"].keys()
    for key in ("greedy", "sampled"):
        low, high = rows[DISTILLED][f"{key}_interval"]
        assert low <= rows[DISTILLED][key] <= high and high - low < 0.1
    assert results["eval_prompts"] == 1024


@pytest.mark.thorough
def test_stage_commands_run_on_its_artefacts(demo, tmp_path):
    assert main(["inspect", "--path", str(demo / "cache"), "--verify"]) == 0
    argv = ["--student", str(demo / "sft"), "--cache", str(demo / "cache"), "--max-steps", "1"]
    assert main(["distill", *argv, "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    assert Path(tmp_path / "again/model.safetensors").is_file()


@pytest.mark.thorough
def test_finished_demo_prints_its_table_again(demo, rows, capsys):
    assert main(["demo", "--out", str(demo)]) == 0
    printed = capsys.readouterr().out
    assert format_table(list(rows.values())) in printed and "[1/" not in printed
    assert main(["demo", "--out", str(demo), "--seed", "1"]) == 2
    assert "holds another recipe (seed was 0, is 1)" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 0}'])
def test_damaged_progress_is_not_a_new_demo(tmp_path, capsys, text):
    (tmp_path / "progress.json").write_text(text)
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "restore it" in one_line(capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["progress.json"]
