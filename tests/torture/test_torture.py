"""A slice of the campaign: a few attacks of every kind, none of which may lose anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.thorough
def test_a_slice_of_the_campaign_loses_nothing():
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run(
        [sys.executable, "-m", "torture", "--slice"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    print(done.stdout)
    assert done.returncode == 0, "see stdout: what was lost, and a table"
    assert "| SIGKILL at a random moment | 8 | 8 | 0 |" in done.stdout
