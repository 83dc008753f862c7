"""The parts of the evidence."""

from benchmarks import objectives
from benchmarks.evidence import ablations, overlap, sampled

PARTS = (objectives.PART, sampled.PART, ablations.PART, overlap.PART)
