"""The parts of the evidence."""

from benchmarks import objectives

PARTS = (objectives.PART,)
