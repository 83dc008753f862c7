"""With LOPD_PTX=80, 90 or 100 the Triton kernels run as compiled PTX, see `tests/ptx`."""

import os

import pytest
from kernel_cases import EMULATED


@pytest.fixture(autouse=True)
def _emulated_kernels(request, monkeypatch):
    if EMULATED:
        from ptx_launch import emulate

        schedule = os.environ.get("LOPD_PTX_SCHEDULE", "block")
        races = request.node.get_closest_marker("deliberate_race") is None
        emulate(monkeypatch, int(EMULATED), schedule=schedule, races=races)
