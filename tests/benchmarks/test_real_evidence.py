"""Tables of the runs on the real model, on rows made by hand."""

import pytest

from benchmarks.evidence import real
from benchmarks.evidence.intervals import NO_ROWS
from lopd.stages.demo.real import DISTILLED

SEEDS = (0, 1, 2)


def row(arm, factor, seed, kl, points=0.5, **more):
    return {
        "arm": arm, "factor": factor, "seed": seed, "kl": kl, "held_out_kl": 2.0 * kl,
        "sampled": points, **more,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def demo(monkeypatch):
    """Rows of three demos: lists end at 1, the control at 2, the sampled token at 4."""
    stages = {
        "student's rollouts": {},
        "teacher's scores": {},
        **{
            stage: {
                "kl": kl,
                "kl_interval": [kl - 0.5, kl + 0.5],
                "held_out_kl": kl,
                "sampled": 0.5,
            }
            for stage, kl in zip(real.OF_THE_DEMO, (1.0, 4.0, 2.0), strict=True)
        },
    }
    rows = [
        {"stage": stage, "seed": seed, "cpu_seconds": 10.0 if seed else None, **values}
        for stage, values in stages.items()
        for seed in SEEDS
    ]
    monkeypatch.setattr(real, "_demo", lambda: rows)


def line_of(text, words):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {words}")]
    return line


def test_the_demos_own_runs_are_those_at_its_rate():
    rows = [row("lists", 0.5, seed, 0.1) for seed in SEEDS]
    text = real.table(rows)  # the control has one rate, so the second of the lists is left out
    both = "0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | +0.0 [+0.0, +0.0]"
    assert line_of(text, "lists") == f"| lists of 64 | 1 | 1 | 1 | 1 | 3 | {both} |"
    assert "| 2.00 [2.00, 2.00] | 2.00 [2.00, 2.00] |" in line_of(text, "sampled token")


def test_two_arms_are_tuned_alike_whatever_a_third_has():
    rows = [row("lists", 0.5, seed, 0.25) for seed in SEEDS]
    rows += [row("control", 0.5, seed, 3.0, points=0.6) for seed in SEEDS]
    text = real.table(rows)
    lists = "| lists of 64 | 0.5, 1 | 0.5 (edge) | 0.5, 1 | 1 (edge) | 3 | 0.13 [0.13, 0.13] |"
    assert line_of(text, "lists").startswith(lists)
    assert line_of(text, "sampled token").startswith("| sampled token | 1 | 1 | 1 | 1 | 3 |")
    assert real.against(rows, "lists", "control")["kl"] == pytest.approx((0.125, 0.125, 0.125))
    assert real.against(rows, "sampled", "lists")["kl"] == pytest.approx((4.0, 4.0, 4.0))


def test_offline_is_compared_with_the_live_run_at_the_demos_rate():
    rows = [row("live", 1.0, seed, 0.5, cpu_seconds=60.0) for seed in SEEDS]
    text = real.live_table([*rows, *(row("lists", 0.5, seed, 0.1) for seed in SEEDS)])
    assert "| 0.50 / 0.50 / 0.50 | 2.00 [2.00, 2.00] | 1.00 [1.00, 1.00] |" in line_of(text, "live")
    assert "| 0.50 [0.50, 0.50] |" in line_of(text, "control")
    assert text.endswith("offline: 2.00 (seed 1), 2.00 (seed 2).")  # 60 / (10 + 10 + 10)


def test_the_grid_has_every_run_of_each_seed():
    rows = [row("sampled", 0.25, 1, 3.0, kl_interval=[2.0, 4.0])]
    text = real.grid_table(rows)
    assert (
        line_of(text, "sampled token | 0.25")
        == "| sampled token | 0.25 |  | 3.00 [2.00, 4.00] |  |"
    )
    both = "4.00 [3.50, 4.50]"
    assert line_of(text, "sampled token | 1") == f"| sampled token | 1 | {both} | {both} | {both} |"
    assert text.index("| lists") < text.index("| sampled") < text.index("| control")
    assert real.grid_table([]) == NO_ROWS


def test_two_seeds_are_too_few():
    rows = [row("live", 1.0, seed, 0.5) for seed in SEEDS[:2]]
    assert real.live_table(rows) == real.live_table([]) == real.table([]) == NO_ROWS
    assert real.against([], "lists", "control") is None


def test_a_cell_is_a_run_that_the_demo_has_not():
    names = [cell.name for cell in real.cells()]
    assert len(set(names)) == len(names) == 3 * 11
    assert not any("/lr1/" in name for name in names if not name.startswith("live"))
    assert set(real.OF_THE_DEMO.values()) == set(real.RATES) and DISTILLED in real.OF_THE_DEMO
