"""Cells and tables of the sampled token, the ablations and the starts, on rows made by hand."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest

from benchmarks.evidence import ablations, overlap, rates, sampled
from lopd.config.distill import DistillConfig
from lopd.provenance.manifest import MANIFEST_NAME

PARTS = (sampled.PART, ablations.PART, overlap.PART)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_cells_have_names_of_their_own_and_run_seed_by_seed(part):
    cells = part.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


def curve(arm, factor, seed, kl, points=(0.5, 0.5, 0.5, 0.5, 0.5, 0.5)):
    steps = [0, *sampled.STEPS]
    return {
        "arm": arm, "factor": factor, "seed": seed, "steps": steps, "kl": kl, "sampled": points,
    }  # fmt: skip


def test_steps_to_a_share_are_interpolated_in_the_log():
    row = curve("lists", 1.0, 0, [1.0, 2.0, 1.0, 0.25, 0.125, 0.0625])
    assert sampled.steps_to(row, 0.5) == pytest.approx(75.0)  # between 50 and 100
    assert sampled.steps_to(row, 0.25) == pytest.approx(100.0)
    assert sampled.steps_to(row, 0.0625 / math.sqrt(1.0)) == pytest.approx(400.0)
    assert math.isinf(sampled.steps_to(row, 0.05))


def curves():
    """Lists end lowest at 1 x; the sampled token takes four times as long at 0.25 x, or fails."""
    rows = []
    for seed, start in enumerate((1.0, 2.0, 4.0)):
        fast = [start * share for share in (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)]
        slow = [start * share for share in (1.0, 1.0, 1.0, 0.5, 0.25, 0.2)]
        rows += [
            curve("lists", 1.0, seed, fast),
            curve("lists", 2.0, seed, [start] * 6),
            curve("sampled", 0.25, seed, slow, (0.0, 0.0, 0.0, 0.0, 0.0, 0.4)),
            curve("sampled", 0.5, seed, [start] * 6),
        ]
    return rows


def test_each_arm_is_compared_at_its_best_rate():
    lists, token = (
        line
        for line in sampled.table(curves()).splitlines()
        if line.startswith(("| lists", "| sa"))
    )
    assert "| 1, 2 | 1 (edge) | 3 | 25 | 100 | 0.0400 | 1 | 0 |" in lists
    assert "| 0.25, 0.5 | 0.25 (edge) | 3 | 100; 4.0 [4.0, 4.0] x |" in token
    assert "> 400, 0 of 3 seeds; more than 4.0 x the lists'" in token
    assert "| 10.00 [10.00, 10.00] | -10.0 [-10.0, -10.0] |" in token


def test_arms_have_as_many_rates_and_are_named_if_seeds_are_missing():
    rows = [row for row in curves() if (row["arm"], row["factor"]) != ("sampled", 0.25)]
    rows.append(curve("clipped", 0.5, 1, [1.0] * 6))
    found = sampled.table(rows)
    assert "| lists of 8 | 1 | 1 | 3 |" in found and "| sampled token | 0.5 | 0.5 | 3 |" in found
    assert "Fewer than 3 seeds so far: sampled token, advantage clipped to 1; control" in found
    three = [*curves(), *(curve("lists", 0.5, s, [1.0, *[0.01] * 5]) for s in (0, 1, 2))]
    assert "| lists of 8 | 0.5, 1 | 0.5 (edge) |" in sampled.table(three)  # of the sampled token, 2
    assert len({len(rates) for rates in sampled.RATES.values()}) == 1


def test_a_rate_can_be_chosen_on_the_other_seeds():
    """At 1 x two seeds end lower, and at 2 x the third, which so gets a rate that is bad for it."""
    ends = {1.0: (0.1, 0.1, 0.9), 2.0: (0.2, 0.2, 0.01)}
    runs = {f: {s: {"kl": kl, "sampled": 0.5} for s, kl in enumerate(k)} for f, k in ends.items()}
    assert rates.best(runs) == 2.0
    assert [row["kl"] for row in rates.held_out(runs).values()] == [0.2, 0.2, 0.9]
    base = {1.0: {seed: {"kl": 0.1, "sampled": 0.5} for seed in (0, 1, 2)}}
    arms, words = {"ours": runs, "base": base}, {"ours": "ours", "base": "base"}
    assert "are: ours 3.30 [0.38, 28.56]." in rates.with_held_out_rates(arms, "base", words)
    assert rates.with_held_out_rates({"base": base}, "base", words) == ""
    assert "chosen on the other seeds" in sampled.table(curves())


def test_the_figure_has_a_line_for_each_seed_and_their_mean():
    (axes,) = sampled.figure(curves()).axes
    assert len(axes.lines) == 2 * 4
    assert axes.lines[3].get_ydata()[-1] == pytest.approx(0.04)


def run(variant, seed, kl, factor=1.0, **more):
    return {
        "variant": variant, "factor": factor, "seed": seed, "kl": kl, "sampled": 1.0 - kl, **more,
    }  # fmt: skip


def line_of(rows, name):
    (line,) = [x for x in ablations.table(rows).splitlines() if f"'{name}/*'" in x]
    return line


def test_a_variant_is_compared_with_its_base_at_rates_and_seeds_that_both_have():
    kls = {0: 0.01, 1: 0.04, 2: 0.16, 3: 0.64}
    rows = [run("default", seed, kl) for seed, kl in kls.items()]
    rows += [run("default", seed, 0.5 * kl, 2.0) for seed, kl in kls.items()]
    rows += [run("forward", seed, 2.0 * kl, f) for seed, kl in kls.items() for f in (1.0, 2.0)]
    rows += [run("compact", seed, 3.0 * kls[seed]) for seed in (0, 1, 2)]
    assert "| 4 | 0.1600 | 4.00 [4.00, 4.00] |" in line_of(rows, "forward")  # the base's best
    assert "| default | 3 | 0.1200 | 3.00 [3.00, 3.00] |" in line_of(rows, "compact")  # 1 x only
    assert "|  | 4 | 0.0400 | 1 |" in line_of(rows, "default")
    assert "jsd" not in ablations.table(rows)
    rows += [run("jsd", seed, 2.0 * kl) for seed, kl in kls.items()]
    rows.append(run("jsd", 0, 0.001, 2.0))  # of one seed: the rate does not count
    assert "| 4 | 0.1600 | 2.00 [2.00, 2.00] |" in line_of(rows, "jsd")


def test_variants_are_sorted_by_what_their_intervals_decide():
    kls = {0: 0.01, 1: 0.02, 2: 0.04}
    rows = [run("default", seed, kl) for seed, kl in kls.items()]
    assert "Fewer than 3 seeds so far" in ablations.table([*rows[:2], *rows[:2]])
    rows += [run("packed", seed, 0.5 * kl) for seed, kl in kls.items()]
    rows += [run("compact", seed, 2.0 * kl) for seed, kl in kls.items()]
    rows += [run("refresh-1", seed, kl * (1.5 - seed / 2)) for seed, kl in kls.items()]
    said = ablations.table(rows).splitlines()[-1]
    assert "KL is lower with `packed`, higher with `compact`, not decided with 1 more. " in said
    assert "equal within the margin with `refresh-1`; `packed`, not decided with 1 more" in said
    assert "3 comparisons" in said


def test_a_held_out_run_says_which_step_it_took():
    rows = [run("default", seed, 0.01) for seed in (0, 1)]
    rows += [run("frozen", seed, 0.1, holdout={"result_step": 600}) for seed in (0, 1)]
    stops = [{"result_step": step} for step in (120, 60)]
    rows += [run("frozen-stop", seed, 0.05, holdout=stop) for seed, stop in enumerate(stops)]
    assert "(result of step 60 to 120) | frozen | 2" in line_of(rows, "frozen-stop")
    assert "result of step" not in line_of(rows, "frozen")


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_has_settings_that_distillation_takes(name, tmp_path, monkeypatch):
    """And a base that shares one of its rates."""
    made = []

    def distil(folder, **changes):
        made.append(DistillConfig(student="s", out=str(tmp_path / folder), **changes))
        manifest = tmp_path / folder / MANIFEST_NAME
        manifest.parent.mkdir()
        manifest.write_text(json.dumps({"holdout": {"result_step": 20}}))
        return {"kl": 0.1, "sampled": 0.9, "greedy": 1.0}

    shared = SimpleNamespace(
        distil=distil,
        cache=lambda k: f"cache-k{k}",
        demo=SimpleNamespace(path=lambda folder: str(tmp_path / folder)),
    )
    monkeypatch.setattr(ablations, "scored", lambda shared, folder, **made: f"cache-{folder}")
    variant = ablations.VARIANTS[name]
    assert set(variant.rates) & set(ablations.VARIANTS[variant.base].rates)
    if variant.fine_tuning:
        return
    row = ablations.Run(name, 0.5, 0).measure(shared)
    (config,) = made
    assert (row["variant"], row["kl"], row["sampled"]) == (name, 0.1, 0.9)
    assert row["steps"] == config.max_steps and config.learning_rate == 1e-3
    assert ("holdout" in row) == (config.holdout > 0)
    assert (config.cache == "cache-k8") == (not variant.sampling and not variant.scoring)


def gap(fine_tuning, seed, offline, live, x):
    return {
        "fine_tuning": fine_tuning, "seed": seed, "topk_overlap": x, "shared_probability": 1 - x,
        "start": {"kl": math.exp(x)}, "offline": {"kl": offline}, "live": {"kl": live},
        "control": {"kl": 2.0 * offline},
    }  # fmt: skip


def test_the_gap_is_compared_by_start_and_correlated_with_it():
    rows = [
        gap(steps, seed, 0.1 * math.exp(x), 0.1, x)
        for steps, x in ((120, 0.1), (430, 0.7))
        for seed in (0, 1, 2)
    ]
    first = overlap.table(rows).splitlines()[2]
    assert first.startswith("| 120 | 3 | 1.1052 | 0.10 | 0.90 | 0.1105 | 0.1000 |")
    assert first.endswith("| 1.11 [1.11, 1.11] | 0.50 [0.50, 0.50] |")
    ends = overlap.table(rows).splitlines()[-2:]
    assert ends[0].endswith(
        "against the live run's, by steps of fine-tuning: higher with 120; 430."
    )
    assert ends[1].endswith("against the control's, by steps of fine-tuning: lower with 120; 430.")
    found = overlap.correlations([*rows, gap(240, 0, 0.2, 0.1, 0.4)]).splitlines()
    assert found[2].split("|")[2].strip() == "7" and "the true ones are wider" in found[-3]
    assert len(overlap.figure(rows).axes) == 2


def test_correlations_within_seeds_leave_out_what_seeds_share():
    """The gap falls with x in every seed, and rises with it over the seeds."""
    rows = [
        gap(steps, seed, math.exp(10 * seed - x), 1.0, seed + x)
        for seed in (0, 1, 2)
        for steps, x in ((120, 0.1), (240, 0.2), (430, 0.4))
    ]
    assert overlap.within_seeds(rows, "topk_overlap") == pytest.approx((-1.0, -1.0, -1.0))
    assert overlap.within_seeds(rows[1:], "topk_overlap") is None  # two seeds of three starts
    found = overlap.correlations(rows).splitlines()[2]
    assert "| +0.99 [" in found and found.endswith("| -1.00 [-1.00, -1.00] |")


def test_a_correlation_has_fishers_interval():
    """r = 0.8 of five pairs: tanh(atanh(0.8) -+ 1.96 / sqrt(2))."""
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    found = overlap.correlated(x, y)
    assert found == pytest.approx((0.8, -0.2797, 0.9863), abs=1e-3)


def test_no_two_variants_share_a_folder_unless_their_settings_are_the_same():
    made: dict[str, object] = {}
    for variant in ablations.VARIANTS.values():
        settings = (variant.sampling, variant.scoring)
        assert made.setdefault(ablations._name(*settings), settings) == settings
    folders = [cell.folder for cell in ablations.cells() if cell.seed == 0]
    assert all(a != b for a, b in itertools.combinations(folders, 2))
