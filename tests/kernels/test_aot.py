"""Every kernel compiles ahead of time, without spills, within shared memory and a table of costs.

Uses the installed Triton and the one in `.triton36` (torch 2.11's), which `make` installs.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest
import sass

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
SHARED_KIB = {"80": 163, "90": 227, "100": 227, "gfx942": 64}
ON_NVIDIA = ("take_kernel", "one_pass_kernel")
VERSIONS = {"installed": None, "3.6": ROOT / ".triton36"}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Version -> rows of aot.py; the versions compile at the same time."""
    running = {}
    for version, path in VERSIONS.items():
        if path is not None and not path.exists():
            continue
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        places = [str(p) for p in (path, ROOT) if p is not None]
        env |= {
            "PYTHONPATH": os.pathsep.join(places),
            "TRITON_CACHE_DIR": str(ROOT / ".triton-cache" / version),
        }
        output = (tmp_path_factory.mktemp("aot") / f"{version}.jsonl").open("w+")
        command = [sys.executable, Path(__file__).with_name("aot.py"), *SHARED_KIB]
        running[version] = (
            subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.PIPE, text=True),
            output,
        )
    rows = {}
    for version, (process, output) in running.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        output.seek(0)
        rows[version] = [json.loads(line) for line in output]
    return rows


@pytest.mark.parametrize("version", VERSIONS)
def test_every_kernel_compiles_without_spills(version, reports):
    if version not in reports:
        pytest.skip("Triton 3.6 is not in .triton36; run `make .triton36/.ready`")
    rows = reports[version]
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) == (8 if version == "installed" else 6)  # the older Triton: not in one pass
    for kernel in kernels:
        targets = set(SHARED_KIB) - ({"gfx942"} if kernel in ON_NVIDIA else set())
        assert {row["target"] for row in rows if row["kernel"] == kernel} == targets
    for row in rows:
        assert row["shared"] <= SHARED_KIB[row["target"]] << 10, row
        if row["target"].startswith("gfx"):
            continue
        assert row["stack"] == 0 and row["spills"] == 0, row
        if row["kernel"] in ("row_kernel", "one_pass_kernel") and "V=33 " not in row["case"]:
            assert row["wide_loads"] > 0, row


def test_the_loops_over_a_row_cost_what_the_table_says(reports):
    """Lower costs are to be recorded too, or a later change could lose them unnoticed."""
    table = json.loads(aot.LIMITS.read_text(encoding="utf-8"))
    update = "run `python tests/kernels/aot.py --update 80 90 100` and commit the table"
    assert table.pop("triton") == aot.triton.__version__, update
    found = aot.limits(reports["installed"])
    assert set(found) == set(table), update
    for case, costs in found.items():
        loops = {
            "reduce_kernel": ["reduce"],
            "write_kernel": ["write_unlisted"],
            "one_pass_kernel": ["visit"],
        }
        _, kernel, what, *_ = case.split()
        expected = loops.get(kernel, ["reduce", "write_unlisted"])
        if what == "split":
            expected = ["reduce"]
        assert list(costs) == ["registers", *expected], case
    changed = {case: (table[case], costs) for case, costs in found.items() if costs != table[case]}
    assert not changed, f"{changed}; to accept these costs, {update}"


NESTED = """
.L_x_1:
	//## File "/somewhere/kernels/rows.py", line {outside}
        /*0000*/              @!P4 LDG.E.128 R12, desc[UR14][R4.64] ;
.L_x_2:
        /*0010*/                   FADD R1, R2, R3 ;
	//## File "/somewhere/kernels/rows.py", line {inside}
        /*0020*/              @!P4 LDG.E.128 R12, desc[UR14][R4.64+0x2000] ;
        /*0030*/                   LDG.E.U16 R12, desc[UR14][R4.64+0x2000] ;
        /*0040*/               @P2 STG.E.64 desc[UR14][R4.64], R2 ;
        /*0050*/              @!P2 BRA `(.L_x_2) ;
        /*0060*/              @!P2 BRA `(.L_x_1) ;
        /*0070*/              @!P2 BRA `(.L_x_3) ;
.L_x_3:
"""


def test_the_costs_of_a_loop():
    function = aot.row_kernels._reduce
    line = inspect.getsourcelines(function.fn)[1]
    text = NESTED.format(outside=line - 1, inside=line + 1)
    assert sass.loop_costs(text, [function], 4) == {
        "reduce": {
            "instructions": 1.25, "loads": 0.5, "loads_bytes": 4.5,
            "stores": 0.25, "stores_bytes": 2.0,
        }
    }  # fmt: skip
    assert sass.loop_costs(text, [aot.row_kernels._write_unlisted], 4) == {}


def test_the_costs_of_a_kernel_without_a_loop_over_its_columns():
    function = aot.row_kernels._reduce
    line = inspect.getsourcelines(function.fn)[1]
    text = NESTED.format(outside=line - 1, inside=line + 1)
    expected = {"loads": 0.5, "loads_bytes": 8.0, "stores": 0.0, "stores_bytes": 0.0}
    assert sass.wide_cost(text, 4) == expected | {"instructions": 2.0}
    kept = sass.without(text, function)
    assert sass.wide_cost(kept, 4) == expected | {
        "loads": 0.25, "loads_bytes": 4.0, "instructions": 0.5,
    }  # fmt: skip


def test_a_spill_would_be_detected(tmp_path):
    """The same report, of a kernel that needs far more registers than a thread has."""
    script = tmp_path / "spilling.py"
    script.write_text(
        """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
sys.path[:0] = sys.argv[1:]
import aot

@triton.jit
def wide(x_ptr, n, BLOCK: tl.constexpr):
    j = tl.arange(0, BLOCK)
    a, b = tl.load(x_ptr + j), tl.load(x_ptr + BLOCK + j)
    for i in range(n):
        a, b = tl.exp(a + b), tl.exp(a - b)
    tl.store(x_ptr + j, a * b)

source = ASTSource(wide, {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {(2,): 32768}, {})
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
usage = aot.nvidia_usage(built.asm["cubin"])
assert usage["stack"] > 0 and usage["spills"] > 0, usage
""",
        encoding="utf-8",
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, script, str(ROOT), str(Path(__file__).parent)]
    subprocess.run(command, check=True, env=env | {"TRITON_CACHE_DIR": str(tmp_path / "cache")})
