"""Changes to PTX that the executor has to notice."""

import inspect
import re


def barrier_lines(module):
    """Lines of a module of kernels that place a barrier."""
    lines = inspect.getsource(module).splitlines()
    return [number for number, line in enumerate(lines, 1) if "tl.debug_barrier()" in line]


def without_barriers(text, file, line):
    """(PTX without the barriers that a line of the file places, their number)."""
    kept, where, count = [], "", 0
    for statement in text.splitlines():
        if ".loc" in statement and "//" in statement:
            where = statement.split("//")[1].strip()
        if statement.strip().startswith("bar.sync") and re.match(rf"{file}:{line}:", where):
            count += 1
        else:
            kept.append(statement)
    return "\n".join(kept), count


def unguarded(text, opcode, occurrence):
    """PTX in which one predicated access is made without its predicate."""
    matches = list(re.finditer(rf"@!?%p\d+ ({re.escape(opcode)})", text))
    match = matches[occurrence]
    return text[: match.start()] + match[1] + text[match.end() :]
