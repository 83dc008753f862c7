"""Stands where a jit function stands, compiles for an absent GPU, and executes the PTX here."""

import functools
import math
import struct

import numpy as np
import torch
import triton
from aot import specialise
from ptx_machine import Machine
from ptx_memory import POISON, Space
from ptx_parser import Program, parse
from triton.backends.compiler import GPUTarget

OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_cooperative_grid")
FORMATS = {"u64": "<Q", "u32": "<I", "f32": "<f"}
BASE = 0x7F00_0000_0000


def compile_ptx(kernel, arguments, capability: int, options) -> tuple[str, int, list[str]]:
    """(PTX, bytes of shared memory, names of the runtime arguments) of a specialisation."""
    target = GPUTarget("cuda", capability, 32)
    source, _ = specialise(kernel, arguments, target)
    built = triton.compile(source, target=target, options=options)
    names = [name for name, type_ in source.signature.items() if type_ != "constexpr"]
    return built.asm["ptx"], built.metadata.shared, names


@functools.lru_cache(maxsize=256)
def parsed(text: str) -> Program:
    return parse(text)


class Emulated:
    """A jit function whose launches run its PTX on the CPU tensors that they are given.

    Args:
        kernel: the jit function.
        capability: compute capability to compile for: 80, 90 or 100.
        rewrite: changes the PTX before it runs.
        machine: options of `ptx_machine.Machine`.
    """

    def __init__(self, kernel, capability: int, rewrite=None, **machine) -> None:
        self.kernel, self.capability = kernel, capability
        self.rewrite, self.machine = rewrite, machine
        self.launched: list[str] = []  # the PTX of each launch

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
            self._launch(grid, arguments, options)

        return launch

    def _launch(self, grid, arguments, options) -> None:
        text, shared, names = compile_ptx(self.kernel, arguments, self.capability, options)
        if self.rewrite is not None:
            text = self.rewrite(text)
        self.launched.append(text)
        program = parsed(text)
        values = [arguments[name] for name in names]
        storages = {}
        for value in values:
            if isinstance(value, torch.Tensor):
                assert value.device.type == "cpu"
                storages.setdefault(value.untyped_storage().data_ptr(), value.untyped_storage())
        order = list(storages)
        sizes = [storages[at].nbytes() for at in order]
        machine_options = {
            "cooperative": options.get("launch_cooperative_grid", False), **self.machine
        }  # fmt: skip
        races = machine_options.get("races", True)
        memory = Space(sizes, BASE, 2, lambda site: machine.describe(site), races)
        for index, at in enumerate(order):
            memory.contents(index)[:] = _bytes(storages[at])
        addresses = dict(zip(order, memory.addresses(), strict=True))
        packed = [
            _pack(p.type, value, addresses)
            for p, value in zip(program.parameters, [*values, 0, 0], strict=True)
        ]  # the last two are scratch memory that Triton may ask for; a use of it is a fault
        x, y, z = (*grid, 1, 1)[:3]
        machine = Machine(program, shared, (x, y, z), memory, packed, **machine_options)
        machine.run()
        unowned = np.ones(len(memory.data), bool)
        for start, end in zip(memory.starts, memory.ends, strict=True):
            unowned[start:end] = False
        assert (memory.data[unowned] == POISON).all()
        for index, at in enumerate(order):
            _bytes(storages[at])[:] = memory.contents(index)


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy()


def _pack(type_: str, value, addresses) -> bytes:
    if isinstance(value, torch.Tensor):
        offset = value.storage_offset() * value.element_size()
        return struct.pack("<Q", addresses[value.untyped_storage().data_ptr()] + offset)
    if type_ == "u32":
        assert -(2**31) <= value < 2**31
        return struct.pack("<i", value)
    if type_ == "f32" and math.isinf(value):
        return np.float32(value).tobytes()
    return struct.pack(FORMATS[type_], value)


def emulate(monkeypatch, capability: int, **machine) -> dict[str, Emulated]:
    """Put `Emulated` in the place of every kernel of lopd_kernels, on CPU tensors too."""
    from lopd_kernels._core import backend
    from lopd_kernels._triton.kernels import listed, one_pass, rows

    kernels = {}
    for module in (rows, listed, one_pass):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            kernel = kernel.kernel if isinstance(kernel, Emulated) else kernel
            kernels[name] = Emulated(kernel, capability, **machine)
            monkeypatch.setattr(module, name, kernels[name])
    monkeypatch.setattr(backend, "uses_triton", lambda like: like.dtype != torch.float64)
    return kernels


def read_logits_once(monkeypatch, columns: int | None, multiprocessors: int) -> None:
    """Let programs of so many columns (None: as on a device) share the rows that they can."""
    from lopd_kernels._triton import one_pass

    monkeypatch.setattr(one_pass, "ENABLED", True)
    monkeypatch.setattr(one_pass, "multiprocessors", lambda device: multiprocessors)
    if columns is not None:
        launch = one_pass.Launch(columns, 4, 128)
        monkeypatch.setattr(one_pass, "LAUNCHES", {False: launch, True: launch})
