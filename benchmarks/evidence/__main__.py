"""Measure what the evidence still lacks: `python -m benchmarks.evidence`.

    python -m benchmarks.evidence [--part NAME ...] [--only PATTERN ...] [--plan] [--table]
                                  [--again [--sample N] [--draw SEED]] [--work DIR] [--out DIR]

Each cell is one JSON line, appended to the file of its part when it is measured. Run a second time,
the command continues with the cells that have no line. `--only` selects cells by name, such as
`unbiased/k4/*` or `*/seed0`; `--plan` lists the missing cells and their minutes on one quiet core;
`--table` prints the tables of the rows so far.

`--again` measures cells that have a line once more, models included, in a folder of the commit in
`--work`, and prints each new value beside the committed one. `--sample N` draws N of them at
random.
"""

from benchmarks.evidence.command import main
from benchmarks.evidence.parts import PARTS

if __name__ == "__main__":
    main(PARTS)
