"""The parts of the evidence."""

from benchmarks import objectives
from benchmarks.evidence import ablations, consistency, live, overlap, real, sampled

PARTS = (
    objectives.PART,
    consistency.PART,
    live.PART,
    sampled.PART,
    ablations.PART,
    overlap.PART,
    real.PART,
)
