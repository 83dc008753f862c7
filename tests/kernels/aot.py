"""Compile every kernel ahead of time: `python tests/kernels/aot.py [--update] CAPABILITY...`

The targets need not be present. The launchers of `lopd_kernels` run on meta tensors of real
sizes; their launches are recorded and compiled for each target. Prints one JSON line per kernel:
registers, stack, spills, shared memory, and per logit the instructions, loads and stores of the
loops over a row. With --update, `aot_limits.json` is written anew; `test_aot.py` holds the kernels
to it. Do not run it with TRITON_INTERPRET=1. TRITON_CACHE_DIR caches the results by source.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import sass
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from lopd_kernels._core.listed_ids import sort_entries
from lopd_kernels._core.rules import (
    CrossEntropyRule,
    DivergenceRule,
    PolicyGradientRule,
    UnbiasedRule,
    encode,
)
from lopd_kernels._core.types import LogitGrads, LogitOptions, RowState, SplitGrads
from lopd_kernels._core.workspace import padded
from lopd_kernels._triton import listed as triton_listed
from lopd_kernels._triton import one_pass as triton_one_pass
from lopd_kernels._triton import rows as triton_rows
from lopd_kernels._triton.kernels import listed as listed_kernels
from lopd_kernels._triton.kernels import one_pass as one_pass_kernels
from lopd_kernels._triton.kernels import rows as row_kernels

LIMITS = Path(__file__).with_name("aot_limits.json")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_cooperative_grid")


class Recorder:
    """Replaces a kernel and records the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            arguments = dict(zip(self.kernel.arg_names, args, strict=False))
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            self.calls.append((arguments | kwargs, options))

        return launch


def specialise(kernel, arguments, target):
    """(ASTSource, key): what Triton compiles for a launch with these arguments, and its name."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = binder(**arguments)
    _, *parts = kernel._pack_args(backend, {}, bound, specialisation, {})
    return ASTSource(kernel, *parts), str(specialisation)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def heads(vocab):
    yield "plain", LogitOptions()
    yield "capped+biased", LogitOptions(1.5, 30.0, 0.7, meta(vocab, dtype=torch.bfloat16))


def row_passes():
    """(label, function, arguments) of the row kernel at its extremes."""
    for vocab, k, dtype, rule, head in (
        (151936, 64, torch.bfloat16, DivergenceRule("reverse_kl", "bucket"), "plain"),
        (262208, 1000, torch.bfloat16, DivergenceRule("jsd", "bucket"), "capped+biased"),
        (50257, 8, torch.float16, DivergenceRule("forward_kl", "truncate"), "plain"),
        (33, 33, torch.float32, DivergenceRule("jsd", "truncate"), "capped+biased"),
        (151936, 65, torch.bfloat16, UnbiasedRule(2.0), "plain"),
        (262208, 64, torch.bfloat16, DivergenceRule("forward_kl", "generalized"), "capped+biased"),
        (128256, 1, torch.bfloat16, PolicyGradientRule(True, "clipped"), "capped+biased"),
        (151936, 1, torch.bfloat16, PolicyGradientRule(False, "token_truncated"), "plain"),
        (151936, 1, torch.float32, CrossEntropyRule(), "plain"),
    ):
        u = meta(2048, padded(vocab))[:, :vocab]
        out = u if dtype == u.dtype else meta(2048, 2 * padded(vocab), dtype=dtype)[:, :vocab]
        listed_ids = triton_rows.locate(meta(2048, k, dtype=torch.int64), None, vocab)
        extra = isinstance(rule, UnbiasedRule)
        target = meta(2048, 2 if isinstance(rule, PolicyGradientRule) else k + 1 + extra)
        arguments = (u, listed_ids, target, meta(2048), rule, dict(heads(vocab))[head], True,
                     meta(2048, 4 + len(rule.extras)), out)  # fmt: skip
        yield f"{encode(rule)[0]} {head} V={vocab} K={k} {dtype}", triton_rows.row_pass, arguments


def in_one_pass(function):
    """The function on a GPU of 132 multiprocessors that reads the logits once."""

    def run(*arguments):
        with (
            mock.patch.object(triton_one_pass, "ENABLED", True),
            mock.patch.object(triton_one_pass, "multiprocessors", lambda device: 132),
        ):
            function(*arguments)

    return run


def splits():
    """The row kernel without a gradient outside the lists, and that gradient of some rows."""
    vocab, k, rule = 151936, 64, DivergenceRule("reverse_kl", "bucket")
    for name, head in heads(vocab):
        u = meta(2048, padded(vocab))[:, :vocab]
        listed_ids = triton_rows.locate(meta(2048, k, dtype=torch.int64), None, vocab)
        split = SplitGrads(meta(2048, k), meta(2048, 4))
        arguments = (u, listed_ids, meta(2048, k + 1), meta(2048), rule, head, True,
                     meta(2048, 8)[:, :4], None, False, split)  # fmt: skip
        yield f"split {name} K={k}", triton_rows.row_pass, arguments
        out = meta(512, padded(vocab), dtype=torch.bfloat16)[:, :vocab]
        rows = meta(512, dtype=torch.int64)
        arguments = (u, rows, meta(512), meta(512), head, out)
        yield f"picked {name}", triton_rows.write_unlisted, arguments


def panels():
    for (name, head), vocab, k in ((h, 151936, k) for h in heads(151936) for k in (8, 64)):
        u = meta(8192, 2048)
        listed_ids = triton_rows.locate(meta(8192, k, dtype=torch.int64), None, vocab)
        state = RowState(meta(8192, 4), meta(8192, k))
        yield (
            f"reduce {name} K={k}",
            triton_rows.reduce,
            (u, 4096, listed_ids, head, True, state),
        )
        grads = LogitGrads(meta(8192), meta(8192), meta(8192), meta(8192, k))
        out = meta(8192, 4096, dtype=torch.bfloat16)[:, :2048]
        yield (
            f"write {name} K={k}",
            triton_rows.write,
            (u, 4096, listed_ids, head, grads, state.listed, out),
        )


def listed():
    for d in (4096, 1000):
        hidden, weight = (meta(size, d, dtype=torch.bfloat16) for size in (8192, 151936))
        ids, grad = meta(8192, 64, dtype=torch.int64), meta(8192, 64)
        yield f"dots D={d}", triton_listed.dots, (hidden, weight, ids, 1)
        arguments = (grad, weight, ids, 1, weight.dtype)
        yield f"hidden_grad D={d}", triton_listed.hidden_grad, arguments
        for add, out in ((False, weight), (True, meta(151936, d))):
            arguments = (sort_entries(grad, ids, 151936), hidden, 1, 0, out, add)
            yield f"weight_grad D={d} add={add}", triton_listed.weight_grad, arguments


def launches():
    """(label, kernel, arguments, options) of everything to compile."""
    for module, names in (
        (row_kernels, ("row_kernel", "reduce_kernel", "write_kernel")),
        (one_pass_kernels, ("take_kernel", "one_pass_kernel")),
        (listed_kernels, ("gather_dot_kernel", "gather_sum_kernel", "segment_sum_kernel")),
    ):
        for name in names:
            setattr(module, name, Recorder(getattr(module, name)))
    recorders = {
        name: value for m in (row_kernels, one_pass_kernels, listed_kernels)
        for name, value in vars(m).items()
        if isinstance(value, Recorder)
    }  # fmt: skip
    once = []
    if triton_one_pass.is_compiled_well():
        once = [(label, in_one_pass(f), arguments) for label, f, arguments in row_passes()]
    for label, function, arguments in (*row_passes(), *once, *splits(), *panels(), *listed()):
        function(*arguments)
        for recorder in recorders.values():
            for launched, options in recorder.calls:
                yield label, recorder.kernel, launched, options
            recorder.calls.clear()


def run_tool(name: str, *arguments: str) -> str:
    command = [TOOLS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def nvidia_usage(cubin: bytes, columns: int = 0, in_registers: bool = False) -> dict:
    """Registers and so on; with `columns` to a thread also what the loops over a row cost.

    With `in_registers` these columns are all that a thread has of a row.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run_tool("cuobjdump", "-res-usage", file.name)
        code = run_tool("nvdisasm", "-g", "-c", file.name)
    counts = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    main_loops = (row_kernels._reduce, row_kernels._write_unlisted) if columns else ()
    return {
        "registers": int(counts["REG"]),
        "stack": int(counts["STACK"]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "wide_loads": len(re.findall(r"\bLDG\.E\.(?:\w+\.)*128\b", code)),
        "loops": {
            "visit": sass.wide_cost(sass.without(code, one_pass_kernels._zero_slice), columns)
        }
        if in_registers
        else sass.loop_costs(code, main_loops, columns),
    }


def amd_usage(assembly: str) -> dict:
    return {
        "registers": int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)[1]),
    }


def compiled(architectures: list[str]) -> Iterator[dict]:
    for label, kernel, arguments, options in launches():
        columns = arguments["BLOCK"] // (32 * options["num_warps"]) if "BLOCK" in arguments else 0
        for name in architectures:
            is_amd = name.startswith("gfx")
            if is_amd and kernel.__module__ == one_pass_kernels.__name__:
                continue  # `one_pass.multiprocessors` refuses this device
            target = GPUTarget("hip", name, 64) if is_amd else GPUTarget("cuda", int(name), 32)
            source, _ = specialise(kernel, arguments, target)
            built = triton.compile(source, target=target, options=options)
            if is_amd:
                usage = amd_usage(built.asm["amdgcn"])
            else:
                once = kernel.__name__ == "one_pass_kernel"
                usage = nvidia_usage(built.asm["cubin"], columns, once)
            row = {"kernel": kernel.__name__, "case": label, "target": name, **options}
            yield {**row, "shared": built.metadata.shared, **usage}


def limits(rows: Iterable[dict]) -> dict[str, dict]:
    """The part of the report that `aot_limits.json` keeps: kernels with loops over a row."""
    return {
        f"sm_{row['target']} {row['kernel']} {row['case']}": {
            "registers": row["registers"],
            **row["loops"],
        }
        for row in rows
        if row.get("loops")
    }


def main(arguments: list[str]) -> None:
    rows = []
    for row in compiled([x for x in arguments if x != "--update"]):
        print(json.dumps(row), flush=True)
        rows.append(row)
    if "--update" in arguments:
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in limits(rows).items()]
        lines.insert(0, f'"triton": {json.dumps(triton.__version__)}')
        LIMITS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
