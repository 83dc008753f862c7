"""Committed rows measured once more: what is measured, where to, and what the comparison says."""

import json
import shutil
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from benchmarks import demo_seeds, readme
from benchmarks.evidence import again, command, frame
from benchmarks.evidence.parts import PARTS

KLS = (1.0, 2.0, 4.0)  # of the seeds; the geometric mean is 2, and [0.357, 11.2] its interval


@dataclass(frozen=True)
class Known:
    seed: int
    minutes = 1.0
    results = ()
    kls: ClassVar[list[float]] = []  # what a measurement finds

    @property
    def name(self):
        return f"a/seed{self.seed}"

    def measure(self, shared):
        print("a stage speaks")
        kl = self.kls[self.seed]
        return {"kl": kl, "kl_interval": [0.9 * kl, 1.1 * kl], "sampled": 0.5}


class NoModels(frame.Shared):
    def __init__(self, work, seed):
        self.demo = SimpleNamespace(path=lambda name: str(self.folder(work, seed) / name))


def table(rows):
    return "\n".join(f"| {row['cell']} | {row['kl']:.1f} |" for row in rows)


PART = frame.Part(
    "one", lambda: [Known(seed) for seed in (0, 1, 2)], {"all": table}, {}, shared=NoModels
)


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Commit the rows of `KLS`; return a function that checks them against other KLs."""
    monkeypatch.setattr(Known, "kls", KLS)
    common = ["--out", str(tmp_path / "rows"), "--work", str(tmp_path / "work")]
    command.main([PART], common)
    committed = (tmp_path / "rows" / "one.jsonl").read_bytes()

    def run(kls, *flags):
        monkeypatch.setattr(Known, "kls", kls)
        capsys.readouterr()
        command.main([PART], [*common, "--again", *flags])
        assert (tmp_path / "rows" / "one.jsonl").read_bytes() == committed
        assert [path.name for path in (tmp_path / "rows").iterdir()] == ["one.jsonl"]
        found = capsys.readouterr().out
        assert "a stage speaks" not in found
        return found

    return run


def new_rows(tmp_path):
    (file,) = (tmp_path / "work").glob("again-*/one.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_cell_with_a_row_is_measured_once_more_beside_it(tmp_path, check):
    found = check(KLS, "--only", "a/seed1")
    assert [row["cell"] for row in new_rows(tmp_path)] == ["a/seed1"]
    assert "| a/seed1 | KL | 2 | 2 | none | [1.8, 2.2] | yes |" in found
    assert "| a | KL | 3 | 2 [0.3574, 11.19] | 2 | yes |" in found
    assert "2 values of 1 cells: 2 the same to the digit" in found
    assert "No table of the documents changes by a digit." in found
    assert "Committed → again" not in found  # the same versions


def test_the_command_without_the_flag_names_it(check, tmp_path, capsys):
    check(KLS, "--plan")
    command.main([PART], ["--out", str(tmp_path / "rows"), "--only", "a/seed1"])
    assert capsys.readouterr().out.endswith("--again measures cells once more and compares.\n")


def test_a_value_outside_is_reported_and_is_no_failure(check):
    found = check((1.0, 2.5, 4.0), "--only", "a/seed1")
    assert "| a/seed1 | KL | 2 | 2.5 | x 1.2500 | [1.8, 2.2] | no |" in found
    assert "| a/seed1 | pass@1 | 0.5 | 0.5 | none |  |  |" in found
    assert "| a | KL | 3 | 2 [0.3574, 11.19] | 2.154 | yes |" in found
    assert "0 within, 1 outside" in found
    assert "| x 1+5.0e-09 |" in check((1.0, 2.0, 4.0 + 2e-8), "--only", "a/seed2")
    assert "-| a/seed1 | 2.0 |\n+| a/seed1 | 2.5 |" in found


def test_the_mean_takes_all_new_rows_of_its_seeds(check):
    assert "| a | KL | 3 | 2 [0.3574, 11.19] | 14 | no |" in check((7.0, 14.0, 28.0))


def test_another_call_continues_and_a_failure_is_one(tmp_path, check):
    check(KLS, "--only", "a/seed0")
    check((), "--only", "a/seed0")  # would fail if it were measured
    check((), "--plan")
    assert "No cell was measured" in check((), "--only", "a/seed2", "--table")
    with pytest.raises(IndexError):
        check(())
    assert [row["cell"] for row in new_rows(tmp_path)] == ["a/seed0"]
    with pytest.raises(SystemExit, match="no row in .* matches --only b/"):
        check(KLS, "--only", "b/*")
    with pytest.raises(SystemExit):
        command.main([PART], ["--sample", "1"])


def test_a_sample_is_drawn_by_its_seed(tmp_path, check):
    check(KLS, "--sample", "2")
    check(KLS, "--sample", "2", "--draw", "0")
    assert len(new_rows(tmp_path)) == 2
    cells = [(PART, Known(seed)) for seed in range(20)]
    samples = [[c.seed for _, c in again.sampled(cells, 5, draw)] for draw in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert all(len(set(each)) == 5 and each == sorted(each) for each in samples)
    assert again.sampled(cells, 30, 0) == again.sampled(cells, None, 0) == cells


def test_the_demo_of_a_seed_is_compared_too():
    rows = [row for row in readme.read_rows(demo_seeds.NAME) if row["seed"] == 1]
    found = demo_seeds.against_committed(rows)
    assert "14 values of 7 cells: 14 the same" in found and "No table of the documents" in found
    changed = [{**row, "kl": 2.0 * row["kl"]} if "kl" in row else row for row in rows]
    assert found.count("| none |") == 14
    assert demo_seeds.against_committed(changed).count("| x 2.0000 |") == 6  # the teacher's is 0


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_committed_row_agrees_with_itself(part, tmp_path):
    if not (readme.RESULTS / part.file).exists():
        return
    shutil.copy(readme.RESULTS / part.file, tmp_path)
    rows = frame.read(tmp_path / part.file)
    names = {row["cell"] for row in rows}
    picked = [(part, cell) for cell in part.cells() if cell.name in names]
    found = again.report(picked, readme.RESULTS, tmp_path)
    assert f"of {len(rows)} cells" in found and " 0 outside." in found
    assert "| no |" not in found and "No table of the documents changes by a digit." in found
    assert all(part.measures(row) for row in rows)
