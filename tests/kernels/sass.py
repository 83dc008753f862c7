"""What a compiled kernel's main loops cost, read from its disassembly (nvdisasm -g)."""

import inspect
import re

INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*?);", re.M
)
LINE = re.compile(r'//## File "[^"]*/(\w+\.py)", line (\d+)')
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def loops(text: str) -> list[list[str]]:
    """The lines of each innermost loop: from a label to the branch that goes back to it."""
    lines, labels, found = text.splitlines(), {}, []
    for index, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\w+):", line):
            labels[label[1]] = index
        branch = re.search(r"\bBRA\b.*`\((\.L_x_\w+)\)", line)
        if branch and branch[1] in labels:
            found.append((labels[branch[1]], index))
    return [
        lines[start : end + 1]
        for start, end in found
        if not any(start < s and e < end for s, e in found)
    ]


def statements_of(function, loop: list[str]) -> int:
    """How often the disassembly of the loop names a line of this jit function."""
    source, first = inspect.getsourcelines(function.fn)
    file = inspect.getsourcefile(function.fn).rpartition("/")[2]
    named = [(match[1], int(match[2])) for match in map(LINE.search, loop) if match]
    return sum(name == file and first <= line < first + len(source) for name, line in named)


def without(text: str, function) -> str:
    """The disassembly but for the code of this jit function."""
    kept, is_other = [], True
    for line in text.splitlines():
        if LINE.search(line):
            is_other = not statements_of(function, [line])
        if is_other:
            kept.append(line)
    return "\n".join(kept)


def wide_cost(text: str, columns: int) -> dict[str, float]:
    """`cost` of a kernel without a loop over its columns, which it loads and stores in 16 bytes.

    Instructions are all of them, those for the lists too.
    """
    lines = [line for line in text.splitlines() if not re.search(r"\b(LDG|STG)\b(?!.*\.128)", line)]
    accesses = cost(lines, columns)
    return {**accesses, **{"instructions": cost(text.splitlines(), columns)["instructions"]}}


def cost(loop: list[str], columns: int) -> dict[str, float]:
    """Per column: instructions, and loads and stores of global memory in instructions and bytes."""
    opcodes = [match[1].split(".") for match in INSTRUCTION.finditer("\n".join(loop))]
    result = {"instructions": len(opcodes) / columns}
    for name, opcode in (("loads", "LDG"), ("stores", "STG")):
        accesses = [parts for parts in opcodes if parts[0] == opcode]
        size = sum(next((WIDTHS[p] for p in parts if p in WIDTHS), 4) for parts in accesses)
        result |= {name: len(accesses) / columns, f"{name}_bytes": size / columns}
    return {name: round(value, 3) for name, value in result.items()}


def loop_costs(text: str, functions, columns: int) -> dict[str, dict[str, float]]:
    """Name of a jit function -> `cost` of its loop, for those that the kernel contains.

    Args:
        text: disassembly.
        functions: jit functions with one loop each.
        columns: elements that a thread handles in one pass of a loop.
    """
    costs = {}
    for function in functions:
        own = max(loops(text), key=lambda loop: statements_of(function, loop))
        if statements_of(function, own):
            costs[function.__name__.strip("_")] = cost(own, columns)
    return costs
