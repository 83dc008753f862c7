"""Must the teacher that scores be the one whose answers the student was fine-tuned on?

Two teachers of the demo's task, A and B, know the same and differ in how they write
(`benchmarks.evidence.habits`). A student of each is distilled from each, on frozen rollouts and
with a live teacher, with few and with many steps. The student of A is also distilled from teachers
between A and B. Where the teachers differ, `lopd distill` is told to train all the same
(`--allow-teacher-mismatch`), or reads scores that `lopd calibrate` has corrected.
"""

from benchmarks.evidence.consistency_cells import cells
from benchmarks.evidence.consistency_tables import (
    dose_table,
    figure,
    gap_table,
    grid_table,
    measures,
    remedy_table,
)
from benchmarks.evidence.frame import Part

PART = Part(
    "consistency",
    cells,
    tables={
        "consistency grid": grid_table,
        "gaps": gap_table,
        "remedies": remedy_table,
        "doses": dose_table,
    },
    figures={"consistency": figure},
    measures=measures,
)
