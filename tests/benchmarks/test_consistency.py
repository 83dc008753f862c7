"""The part `consistency`: habits of its teachers, its cells, tables and verdicts of known rows."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.evidence import consistency, consistency_cells, consistency_tables
from benchmarks.evidence.consistency_cells import CALIBRATED, LISTS, LONG, SAMPLED, SHORT, Run
from benchmarks.evidence.consistency_tables import Setting
from benchmarks.evidence.habits import SHARES, Habits, short
from benchmarks.evidence.intervals import IN_PART, NO_ROWS, NOT, REPRODUCED, UNDECIDED
from lopd.config.distill import DistillConfig
from lopd.stages import distill
from lopd.stages.demo.arithmetic import solve, write_prompts
from lopd.stages.demo.driver import DemoStage


def start(sft, opd, seed, *, kl=0.2, disagreement=0.0):
    setting = {"sft": sft, "opd": opd, "steps": 0, "seed": seed}
    return {**setting, "disagreement": disagreement, "kl": kl, "sampled": 0.5}


def run(sft, opd, seed, kl, *, sampled=0.9, objective=LISTS, live=False, steps=SHORT):
    setting = {"sft": sft, "opd": opd, "seed": seed, "objective": objective, "live": live}
    return {**setting, "steps": steps, "kl": kl, "sampled": sampled}


SEEDS = {0: 0.01, 1: 0.02, 2: 0.04}  # the KL of A's student to A after few steps
FROZEN = Setting(LISTS, False, SHORT)


def rows():
    """From B, A's student has 6 times the KL of its own teacher's after few steps, 3 after many."""
    found = []
    for seed, kl in SEEDS.items():
        for name, apart in (("A", 0.0), ("same", 0.01), ("half", 0.03), ("B", 0.07)):
            found.append(start("A", name, seed, disagreement=apart))
        for steps, own, factor in ((SHORT, kl, 6.0), (LONG, kl / 2, 3.0)):
            found += [
                run("A", "A", seed, own, steps=steps),
                run("A", "B", seed, factor * own, sampled=0.7, steps=steps),
                run("B", "B", seed, 2 * own, sampled=0.8, steps=steps),
            ]
    return found


def test_the_short_habit_leaves_out_the_running_value():
    solution, _ = solve("3+5*2-7*4=")
    assert solution == "3+5=8;8*2=6;6-7=9;9*4=6;#6"
    assert short(solution) == "+5=8;*2=6;-7=9;*4=6;#6"


def test_demonstrations_are_long_in_the_share_of_their_teacher(tmp_path):
    (tmp_path / "prompts").mkdir()
    prompts = [f"{a}+{b}*{c}-7*4=" for a in range(10) for b in range(10) for c in range(10)]
    path = write_prompts(tmp_path / "prompts" / "demonstrations.jsonl", prompts, completions=True)
    habits = Habits(SimpleNamespace(out=tmp_path, prompts={"demonstrations": path}))
    file = habits._demonstrations("habit-A", 0.5, slice(100, 200))  # of other settings
    assert file == habits._demonstrations("habit-A", 0.9, slice(100, 1000))
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    assert len(lines) == 900 and '"1+0*0-7*4="' in lines[0]
    long = sum('"completion": "+' not in line for line in lines)
    assert long / 900 == pytest.approx(SHARES["A"], abs=0.03)


def test_the_cells_of_a_seed_come_together_with_their_starts_first():
    cells = consistency_cells.cells()
    seeds = [cell.seed for cell in cells]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2, 3, 4}
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert names[:2] == ["start/A-A/seed0", "start/A-B/seed0"]
    assert {"A-B/lists/live/600/seed0", "A-half/lists/frozen/600/seed4"} <= set(names)


@pytest.mark.parametrize(
    ("cell", "used"),
    [
        (Run("B", "B", LISTS, False, SHORT, 0), ("reverse_kl", False, 0, "scores-B-B")),
        (Run("A", "B", SAMPLED, False, LONG, 0), ("policy_gradient", True, 0, "scores-A-B")),
        (
            Run("A", "B", CALIBRATED, False, LONG, 0),
            ("policy_gradient", False, 0, "calibrated-A-B"),
        ),
        (Run("A", "B", LISTS, True, SHORT, 0), ("reverse_kl", True, 1, "scores-A-B")),
    ],
)
def test_a_run_overrides_the_gate_only_for_another_teacher(monkeypatch, tmp_path, cell, used):
    ran = []
    monkeypatch.setattr(distill, "main", ran.append)
    monkeypatch.setattr(Habits, "cache", lambda self, *pair: f"scores-{'-'.join(pair)}")
    monkeypatch.setattr(Habits, "calibrated", lambda self, *pair: f"calibrated-{'-'.join(pair)}")
    monkeypatch.setattr(Habits, "student", lambda self, name: f"student-{name}")
    monkeypatch.setattr(Habits, "teacher", lambda self, name: f"teacher-{name}")
    monkeypatch.setattr(Habits, "evaluate", lambda self, *names: {"evaluated": names})
    config = DistillConfig(student="s", cache="c", out="o", max_steps=1)
    shared = SimpleNamespace(
        demo=SimpleNamespace(path=lambda name: str(tmp_path / name)),
        distillation=DemoStage("distilled", "distill", distill, config),
    )
    row = cell.measure(shared)
    (found,) = ran
    settings = (found.objective, found.allow_teacher_mismatch, found.refresh_every, found.cache)
    assert settings == used and found.max_steps == cell.steps
    assert found.student == str(tmp_path / f"student-{cell.sft}")
    assert found.teacher == (str(tmp_path / "teacher-B") if cell.live else None)
    assert row["evaluated"][1] == cell.opd and row["live"] == cell.live


def test_a_gap_is_that_to_a_consistent_pair_on_the_same_seeds():
    found = consistency_tables.gap(rows()[:-1], "A", FROZEN)
    assert found["kl"] == pytest.approx((6.0, 6.0, 6.0))
    assert found["points"] == pytest.approx((-20.0, -20.0, -20.0))
    found = consistency_tables.gap(rows(), "B", Setting(LISTS, False, LONG))
    assert found["kl"] == pytest.approx((1.5, 1.5, 1.5))
    assert consistency_tables.change(rows(), LISTS, live=False) == pytest.approx((0.25,) * 3)
    assert consistency_tables.gap(rows()[:20], "A", FROZEN) is None  # two seeds
    calibrated = [
        run("A", opd, seed, factor * kl, objective=objective)
        for seed, kl in SEEDS.items()
        for opd, objective, factor in (("B", CALIBRATED, 2.0), ("A", SAMPLED, 1.0))
    ]
    found = consistency_tables.gap(calibrated, "A", Setting(CALIBRATED, False, SHORT))
    assert found["kl"] == pytest.approx((2.0, 2.0, 2.0))


def test_tables_hold_the_known_values():
    grid = consistency_tables.grid_table(rows())
    assert "| lists, frozen, 600 steps |" in grid
    assert "0.0300 (0.0150 to 0.0600), 0.700, n = 3" in grid
    gaps = consistency_tables.gap_table(rows())
    assert "| A → B | A → A | 6.00 [6.00, 6.00] | -20.0 [-20.0, -20.0] | 3 |" in gaps
    assert "| A → B | B → B | 3.00 [3.00, 3.00] | -10.0 [-10.0, -10.0] | 3 |" in gaps
    assert "A → B, B → A" not in gaps
    gaps = consistency_tables.gap_table([*rows(), *(run("B", "A", s, SEEDS[s]) for s in SEEDS)])
    assert "| A → B, B → A | A → A, B → B | 1.73 [1.73, 1.73] | -5.0 [-5.0, -5.0] | 3 |" in gaps
    said = "both others: more than a quarter higher with lists, frozen, 200 steps."
    assert gaps.endswith(said) and said not in consistency_tables.gap_table(rows())
    doses = consistency_tables.dose_table(rows()).splitlines()
    assert [line.split("|")[1].strip() for line in doses[2:6]] == ["A", "same", "half", "B"]
    assert doses[5].startswith("| B | 0.070 | 0.2000 | 3 | 0.1200 | 6.00 [6.00, 6.00] |")
    assert doses[-1].startswith("`half` writes half")


def test_a_remedy_is_compared_with_what_it_replaces_on_the_same_steps():
    live = [run("A", "B", s, 3.0 * kl, sampled=0.8, live=True) for s, kl in SEEDS.items()]
    text = consistency_tables.remedy_table([*rows(), *live])
    line = "| lists, frozen, 200 steps | lists, live, 200 steps | 0.50 [0.50, 0.50] | +10.0"
    assert line in text and text.count("\n") == 2
    assert consistency_tables.remedy_table(rows()) == NO_ROWS


def test_means_of_too_few_seeds_are_left_blank():
    few = [row for row in rows() if (row["sft"], row["opd"]) == ("A", "A") or row["seed"] < 2]
    (line,) = [x for x in consistency_tables.grid_table(few).splitlines() if "200 steps" in x]
    assert line.split("|")[2].endswith("n = 3 ") and not line.split("|")[3].strip()
    doses = consistency_tables.dose_table(few).splitlines()
    assert [line.split("|")[1].strip() for line in doses[2:]] == ["A"]


@pytest.mark.parametrize("count", [0, 1, 5, 9])
def test_tables_and_figure_are_made_of_whatever_rows_there_are(count):
    for table in consistency.PART.tables.values():
        assert table(rows()[:count])
    if count:
        assert consistency.PART.figures["consistency"](rows()[:count])


@pytest.mark.parametrize(
    ("remains", "change", "verdict"),
    [
        (REPRODUCED, (1.0, 0.9, 1.1), REPRODUCED),
        (REPRODUCED, (0.5, 0.4, 0.6), IN_PART),
        (REPRODUCED, (0.9, 0.5, 1.6), UNDECIDED),
        (NOT, (1.0, 0.9, 1.1), NOT),
        (UNDECIDED, (0.5, 0.4, 0.6), UNDECIDED),
    ],
)
def test_an_error_is_irreducible_if_it_remains_and_does_not_shrink(remains, change, verdict):
    assert consistency_tables.irreducible(remains, change) == verdict


def test_a_student_suffers_only_if_it_does_against_both_bases():
    assert consistency_tables.suffers(rows(), FROZEN) == REPRODUCED
    without = [row for row in rows() if row["sft"] == "A"]
    assert consistency_tables.suffers(without, FROZEN) == UNDECIDED
    easy = [run("B", "B", seed, 20 * kl) for seed, kl in SEEDS.items()]
    assert consistency_tables.suffers([*without, *easy], FROZEN) == IN_PART
    live = Setting(LISTS, True, SHORT)
    assert consistency_tables.suffers(rows(), FROZEN, live) == UNDECIDED
