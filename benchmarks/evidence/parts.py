"""The parts of the evidence."""

from benchmarks import objectives
from benchmarks.evidence import consistency, live

PARTS = (objectives.PART, consistency.PART, live.PART)
