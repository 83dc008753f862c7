"""Kernels of a few hand-written instructions."""

import struct

import numpy as np
from ptx_machine import Machine
from ptx_memory import Space
from ptx_parser import parse

BASE = 1 << 40
PROLOGUE = """
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    shl.b32 %r3, %r1, 2;
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
"""


def execute(body, *, threads=64, words=256, blocks=1, shared=1024, **options):
    """The words of global memory after a kernel of one pointer; %rd3 is the thread's word."""
    program = parse(f""".visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0
)
.reqntid {threads}
{{
	.reg .pred %p<8>;
	.reg .b16 %rs<8>;
	.reg .b32 %r<32>;
	.reg .b64 %rd<16>;
{PROLOGUE}
{body}
	ret;
}}
""")  # fmt: skip
    memory = Space([4 * words], BASE, 2, lambda site: machine.describe(site), True)
    memory.contents(0)[:] = 0
    address = struct.pack("<Q", memory.addresses()[0])
    machine = Machine(program, shared, (blocks, 1, 1), memory, [address], **options)
    machine.run()
    return memory.contents(0).view(np.uint32)
