"""Measure what the evidence still lacks: `python -m benchmarks.evidence`.

    python -m benchmarks.evidence [--part NAME ...] [--only PATTERN ...] [--plan] [--table]
                                  [--work DIR] [--out DIR]

Each cell is one JSON line, appended to the file of its part when it is measured. Run again, the
command continues with the cells that have no line. `--only` selects cells by name, such as
`unbiased/k4/*` or `*/seed0`; `--plan` lists the missing cells and their minutes on one quiet core;
`--table` prints the tables of the rows so far.
"""

from benchmarks.evidence.frame import main
from benchmarks.evidence.parts import PARTS

if __name__ == "__main__":
    main(PARTS)
