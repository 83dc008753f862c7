"""A rehearsal of the evidence: every kind of cell runs at a tiny size, and its row is tabulated.

Nothing is replaced but sizes, and SmolLM2 by a random model: cells run as the command runs them,
with the stages, models and folders that they have in a campaign of hours.
"""

import gc
import json
import re
from dataclasses import replace

import pytest
from helpers_demo import TinyRealDemo, shrink_toy_demo

from benchmarks import offlist, readme
from benchmarks.evidence import (
    ablations,
    again,
    claims,
    command,
    consistency_cells,
    consistency_tables,
    frame,
    habits,
    live_cells,
    objective_cells,
    overlap,
    real,
    sampled,
)
from benchmarks.evidence.intervals import FEWEST
from benchmarks.evidence.parts import PARTS

FEW = {"max_steps": 4, "holdout": 2, "eval_steps": 2, "limit": 4}  # of each variant's settings
SIZES = {
    habits: {"BASE_STEPS": 2, "TUNING_STEPS": 2, "STUDENT_STEPS": 2, "DEMONSTRATIONS": 8},
    objective_cells: {"STEPS": 2, "BATCHES": 2},
    live_cells: {"STEPS": 2},
    sampled: {"STEPS": (1, 2)},
    overlap: {"STEPS": 2, "STARTS": (2, 1), "SEQUENCES": 4},
    ablations: {"STEPS": 2},
}
SHORT, LONG = 1, 2  # steps of the part `consistency`, by which its tables know the runs


def shrink(patch):
    """Make models, data and runs of the evidence tiny, until `patch` is undone."""
    shrink_toy_demo(patch)
    patch.setattr(real.RealShared, "kind", TinyRealDemo)
    for module, sizes in SIZES.items():
        for name, value in sizes.items():
            patch.setattr(module, name, value)
    for name, variant in ablations.VARIANTS.items():
        distilling, sampling = (
            {key: FEW.get(key, value) for key, value in settings.items()}
            for settings in (variant.distilling, variant.sampling)
        )
        tiny = replace(variant, distilling=distilling, sampling=sampling)
        patch.setitem(ablations.VARIANTS, name, tiny)
    few = {consistency_cells.SHORT: SHORT, consistency_cells.LONG: LONG}
    for name in ("SETTINGS", "CONTROLS"):
        settings = getattr(consistency_tables, name)
        settings = tuple(replace(each, steps=few[each.steps]) for each in settings)
        patch.setattr(consistency_tables, name, settings)
    for name, setting in vars(claims).copy().items():
        if isinstance(setting, consistency_tables.Setting):
            patch.setattr(claims, name, replace(setting, steps=few[setting.steps]))
    for module in (consistency_cells, consistency_tables, claims):
        patch.setattr(module, "SHORT", SHORT)
        patch.setattr(module, "LONG", LONG)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The work folder of all parts, which share models, while everything is tiny."""
    gc.freeze()  # training ends with a collection, which looks at all that was ever imported
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield tmp_path_factory.mktemp("evidence")
    gc.unfreeze()


def names(part):
    """The names of all cells of one seed."""
    first, *_ = cells = part.cells()
    return [cell.name for cell in cells if cell.seed == first.seed]


def kinds(part):
    """The last cell of each kind; names of one kind differ in numbers only."""
    return list({re.sub(r"\d+(\.\d+)?", "#", name): name for name in names(part)}.values())


def rehearse(part, cells, work, out):
    """Measure cells of a seed; tables, figures, claims and a check as if others had their rows."""
    options = ["--work", str(work), "--out", str(out)]
    command.main([part], [*options, "--only", *cells])
    rows = frame.read(out / part.file)
    assert sorted(row["cell"] for row in rows) == sorted(cells)
    seeds = range(rows[0]["seed"], rows[0]["seed"] + FEWEST)
    rows = [
        row | {"seed": seed, "cell": row["cell"].replace(f"seed{seeds[0]}", f"seed{seed}")}
        for seed in seeds
        for row in rows
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / part.file).write_text(text, encoding="utf-8")
    command.main([part], [*options, "--table"])
    frame.draw(part, out)
    assert all((out / f"{name}.svg").stat().st_size for name in part.figures)
    assert claims.table(lambda name: frame.read(out / name) or readme.read_rows(name))
    measured = [(part, cell) for cell in part.cells() if cell.name in cells]
    assert f" of {len(cells)} cells: " in again.report(measured, out, out)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_kind_of_cell_runs_and_is_tabulated(part, work, tmp_path):
    rehearse(part, kinds(part), work, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_cell_of_a_seed_runs_and_is_tabulated(part, work, tmp_path):
    rehearse(part, names(part), work, tmp_path)


def test_the_demo_of_the_evidence_is_measured_outside_the_lists(work, tmp_path):
    offlist.main(["--work", str(work), "--out", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / offlist.NAME).read_text().splitlines()]
    assert [(row["at"], row["k"]) for row in rows] == [
        (at, k) for at in ("start", "end") for k in offlist.DEMO_LISTS
    ]
