"""The frame of the evidence: its plan, how it continues, what a row holds, and its figures."""

import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from benchmarks import readme
from benchmarks.evidence import command, frame
from benchmarks.evidence.intervals import NO_ROWS
from benchmarks.evidence.parts import PARTS
from lopd.errors import ShardError
from lopd.store.folders import locked


@dataclass(frozen=True)
class Counted:
    seed: int
    minutes = 1.0

    @property
    def name(self):
        return f"a/{self.seed}"

    @property
    def results(self):
        return [f"result-{self.seed}"]

    def measure(self, shared):
        return {"of": shared.seed}


def figure(rows):
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([row["seed"] for row in rows])
    return drawn


class StandIn(frame.Shared):
    """Makes no models."""

    minutes = 2.0
    made: ClassVar[list[int]] = []  # the seeds

    def __init__(self, work, seed):
        self.made.append(seed)
        self.seed, folder = seed, self.folder(work, seed)
        self.demo = SimpleNamespace(path=lambda name: str(folder / name))


class Larger(StandIn):
    minutes = 7.0
    prefix = "larger"


def part(name, shared=StandIn):
    def table(rows):
        return f"{name}: {len(rows)} rows"

    cells = [Counted(seed) for seed in (0, 1, 2)]
    return frame.Part(name, lambda: cells, {name: table}, {name: figure}, shared=shared)


@pytest.fixture
def made(monkeypatch):
    """The seeds whose models were made."""
    monkeypatch.setattr(StandIn, "made", [])
    return StandIn.made


def rows_of(name, folder):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_a_second_call_continues_with_the_missing_cells(tmp_path, made, capsys):
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    command.main([part("one")], [*common, "--plan"])
    assert "3 cells, 9 minutes" in capsys.readouterr().out and not made
    command.main([part("one")], [*common, "--only", "*/1"])
    command.main([part("one")], common)
    rows = rows_of("one", tmp_path)
    assert [row["cell"] for row in rows] == ["a/1", "a/0", "a/2"]
    assert rows[0]["command"] == "python -m benchmarks.evidence --part one --again --only 'a/1'"
    assert made == [1, 0, 2] and rows[0]["of"] == 1 and rows[0]["commit"]
    assert rows[0]["minutes"] >= 0.0 and rows[0]["dirty"] in (False, True)


def test_parts_are_chosen_by_name_and_share_the_models_of_a_seed(tmp_path, made, capsys):
    parts = [part("one"), part("two"), part("three")]
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    command.main(parts, [*common, "--part", "one", "three", "--only", "a/2"])
    assert made == [2]
    assert len(rows_of("one", tmp_path)) == len(rows_of("three", tmp_path)) == 1
    assert not (tmp_path / "two.jsonl").exists()
    capsys.readouterr()
    command.main(parts, [*common, "--table"])
    assert capsys.readouterr().out.split("\n\n")[:2] == ["one: 1 rows", "two: 0 rows"]
    assert made == [2]


def test_parts_with_other_models_have_folders_of_their_own(tmp_path, made, capsys):
    parts = [part("one"), part("two", Larger), part("three", Larger)]
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--only", "a/2"]
    command.main(parts, [*common, "--plan"])
    assert "3 cells, 12 minutes" in capsys.readouterr().out  # a minute each, 2 and 7 of models
    command.main(parts, common)
    assert made == [2, 2]
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"seed2", "larger2"}


def test_a_figure_is_drawn_alike_every_time(tmp_path, made):
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    command.main([part("one")], common)
    first = (tmp_path / "one.svg").read_bytes()
    assert first.startswith(b"<?xml")
    command.main([part("one")], common)
    assert (tmp_path / "one.svg").read_bytes() == first


def test_a_cell_starts_without_its_earlier_results(tmp_path, made):
    """And no other folder is removed."""
    folder = tmp_path / "work" / "seed1"
    for name in ("result-1", "eval/result-1", "eval/result-10", "shared"):
        (folder / name).mkdir(parents=True)
    common = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--only", "a/1"]
    command.main([part("one")], common)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}
    assert found == {"eval", "eval/result-10", "shared"}


def test_a_cell_that_another_process_measures_meanwhile_has_one_row(tmp_path, made):
    todo, work = [(part("one"), Counted(0)), (part("one"), Counted(1))], tmp_path / "work"
    with locked(work / "seed0"), pytest.raises(ShardError):
        frame.run(todo, work, tmp_path)
    frame.run(todo[1:], work, tmp_path)
    frame.run(todo, work, tmp_path)  # planned before the other had its row
    assert [row["cell"] for row in rows_of("one", tmp_path)] == ["a/1", "a/0"]


def test_parts_and_blocks_have_names_of_their_own():
    names = [part.name for part in PARTS]
    blocks = [name for part in PARTS for name in part.tables]
    assert len(set(names)) == len(names) and len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_committed_row_is_that_of_one_cell(part):
    rows = frame.read(readme.RESULTS / part.file)
    names = [row["cell"] for row in rows]
    assert len(set(names)) == len(names)
    assert set(names) <= {cell.name for cell in part.cells()}
    assert all(row["command"].endswith(f" --only '{row['cell']}'") for row in rows)
    assert not any(row["dirty"] for row in rows)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_tables_without_rows_say_so(part):
    if part.name != "objectives":  # whose rows are complete
        assert {table([]) for table in part.tables.values()} == {NO_ROWS}
