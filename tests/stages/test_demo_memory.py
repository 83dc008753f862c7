"""Peaks of memory by part."""

import platform

import pytest
import torch

from lopd.stages.demo.memory import peak_mib, reset_peak

MIB = 2**20
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc on Linux")


def taken(size, count):
    """Tensors of `size` bytes that are written, so resident."""
    return [torch.full((size,), 1, dtype=torch.uint8) for _ in range(count)]


@pytest.mark.parametrize("size", [MIB // 32, 8 * MIB], ids=["from-the-heap", "from-the-system"])
def test_memory_that_an_earlier_part_has_freed_counts_for_the_next(size):
    count = 256 * MIB // size
    earlier = taken(size, 2 * count)
    kept = taken(size, 1)  # above the others in the heap, so that it does not shrink by itself
    del earlier
    reset_peak()
    start = peak_mib()
    later = taken(size, count)
    del later
    assert peak_mib() - start == pytest.approx(256, abs=40)
    assert kept
