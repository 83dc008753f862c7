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


def is_of(function, loop: list[str]) -> bool:
    """Whether the loop loads from global memory on a line of this jit function."""
    source, first = inspect.getsourcelines(function.fn)
    file, where = inspect.getsourcefile(function.fn).rpartition("/")[2], ("", 0)
    for line in loop:
        if source_line := LINE.search(line):
            where = source_line[1], int(source_line[2])
        loads = re.search(r"\bLDG\b", line)
        if loads and where[0] == file and first <= where[1] < first + len(source):
            return True
    return False


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
        functions: jit functions with one loop over global memory each.
        columns: elements that a thread handles in one pass of a loop.
    """
    costs = {}
    for function in functions:
        own = [loop for loop in loops(text) if is_of(function, loop)]
        assert len(own) <= 1, f"{function.__name__} has {len(own)} loops"
        if own:
            costs[function.__name__.strip("_")] = cost(own[0], columns)
    return costs
