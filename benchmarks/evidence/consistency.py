"""x"""

from benchmarks.evidence.consistency_cells import cells
from benchmarks.evidence.frame import Part

PART = Part("consistency", cells, tables={}, figures={})
