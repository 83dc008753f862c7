"""From PTX text to basic blocks. Whatever is not understood raises `PtxError`.

A block ends at a branch, at `ret`, at `bar.sync` and after an atomic access, and an instruction of
whole warps begins one, so that a machine only switches threads between blocks.
"""

import re
from dataclasses import dataclass, field

import numpy as np

WIDTHS = {"pred": 0, "b8": 1, "u8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2}
WIDTHS |= {"b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8}


class PtxError(Exception):
    """Text or an instruction whose meaning is not known here."""


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # bytes; 0 is a predicate


@dataclass(frozen=True)
class Immediate:
    value: int | float
    is_float: bool = False


@dataclass(frozen=True)
class Special:
    """`%tid.x` and its like."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | str  # a register, or the name of a parameter or of the shared memory
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple
    guard: Register | None = None
    negated: bool = False
    where: str = ""  # source line

    def __str__(self) -> str:
        return f"{self.opcode} at {self.where or 'an unknown line'}"


@dataclass
class Block:
    body: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None  # bra, ret, bar.sync, or None to fall into the next block

    @property
    def needs_whole_warps(self) -> bool:
        return bool(self.body) and is_warp_wide(self.body[0].opcode)

    @property
    def is_atomic(self) -> bool:
        return bool(self.body) and is_atomic(self.body[-1].opcode)


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str


@dataclass
class Program:
    name: str
    parameters: list[Parameter]
    threads: int
    registers: dict[str, int]  # name -> width
    blocks: list[Block]
    labels: dict[str, int]  # label -> index of its block

    @property
    def has_atomics(self) -> bool:
        return any(block.is_atomic for block in self.blocks)


def is_atomic(opcode: str) -> bool:
    """Whether threads may make this access to one address at one time."""
    kind, *words = opcode.split(".")
    ordered = {"volatile", "relaxed", "acquire", "release"}.intersection(words)
    return kind in ("atom", "red") or (kind in ("ld", "st") and bool(ordered))


def is_warp_wide(opcode: str) -> bool:
    return opcode.startswith(("shfl.", "redux.", "ldmatrix.", "stmatrix.", "bar.warp."))


_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\((.*?)\)(.*?)\n\{\n(.*?)\n\}", re.DOTALL)
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*?//\s*(.*))?")


def parse(text: str) -> Program:
    """The only kernel of a PTX module."""
    entries = _ENTRY.findall(text)
    if len(entries) != 1:
        raise PtxError(f"expected one kernel, found {len(entries)}")
    name, parameters, directives, body = entries[0]
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    if threads is None:
        raise PtxError(f"{name}: no .reqntid, so the number of threads is not known")
    declared = [_parameter(line) for line in parameters.split(",") if line.strip()]
    program = Program(name, declared, int(threads[1]), {}, [Block()], {})
    where = ""
    for line in body.splitlines():
        location = _LOCATION.search(line)
        if location:
            where = (location[3] or f"file {location[1]} line {location[2]}").strip()
            continue
        statements = line.split("//")[0].strip()
        label = re.match(r"([$\w]+):\s*(.*)$", statements)
        if label:
            if program.blocks[-1].body or program.blocks[-1].end:
                program.blocks.append(Block())
            program.labels[label[1]] = len(program.blocks) - 1
            statements = label[2]
        for statement in filter(None, (part.strip() for part in statements.split(";"))):
            _statement(program, statement, where)
    return program


def _parameter(line: str) -> Parameter:
    words = line.split()
    type_, name = words[1].lstrip("."), words[-1]
    if words[0] != ".param" or type_ not in WIDTHS:
        raise PtxError(f"parameter {line.strip()!r}")
    return Parameter(name, type_)


def _statement(program: Program, statement: str, where: str) -> None:
    if statement.startswith(".reg"):
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>", statement)
        if match is None:
            raise PtxError(f"declaration {statement!r}")
        width = WIDTHS[match[1]]
        program.registers |= {f"{match[2]}{i}": width for i in range(int(match[3]))}
        return
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)(?:\s+(.*))?", statement, re.DOTALL)
    if match is None or statement.startswith("."):
        raise PtxError(f"statement {statement!r} at {where}")
    negated, guard, opcode, operands = match.groups()
    instruction = Instruction(
        opcode,
        tuple(_operand(program, text) for text in _split(operands or "")),
        None if guard is None else _register(program, guard),
        bool(negated),
        where,
    )
    if is_warp_wide(opcode) and program.blocks[-1].body:
        program.blocks.append(Block())
    block = program.blocks[-1]
    if opcode in ("bra", "bra.uni", "ret", "bar.sync"):
        block.end = instruction
        program.blocks.append(Block())
    else:
        block.body.append(instruction)
        if is_atomic(opcode):
            program.blocks.append(Block())


def _split(text: str) -> list[str]:
    """Operands at the commas outside braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def _register(program: Program, name: str) -> Register:
    if name not in program.registers:
        raise PtxError(f"register {name} is not declared")
    return Register(name, program.registers[name])


def _operand(program: Program, text: str):
    if text.startswith("{"):
        return Vector(tuple(_operand(program, part) for part in _split(text.strip("{} "))))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if match is None:
            raise PtxError(f"address {text!r}")
        base, offset = match[1], int(match[2] or 0)
        return Address(_register(program, base) if base.startswith("%") else base, offset)
    if re.fullmatch(r"%(tid|ctaid|ntid|nctaid)\.[xyz]|%(laneid|warpid)", text):
        return Special(text[1:])
    if text.startswith("%"):
        return _register(program, text)
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
        value = np.array(int(text[2:], 16), np.uint32).view(np.float32)
        return Immediate(float(value), True)
    if re.fullmatch(r"-?\d+|-?0x[0-9A-Fa-f]+", text):
        return Immediate(int(text, 0))
    if re.fullmatch(r"[$\w]+", text):
        return text  # a label or the name of the shared memory
    raise PtxError(f"operand {text!r}")
