"""Write docs/layout.md from the first docstring line of every module: `python docs/layout.py`."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "layout.md"
HEAD = """# Layout

Every module with the first line of its docstring; `__init__.py` says what a package is for.
`python docs/layout.py` writes this page, and `tests/test_docs.py` fails when it is out of date.
[design.md](design.md) explains the direction of the imports.
"""
PACKAGES = ("lopd_kernels", "lopd", "benchmarks", "hub", "docs")
TESTS = "tests"


def summary(path: Path) -> str:
    """The first line of a module's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise SystemExit(f"{path}: no docstring; say in one line what the module contains")
    return docstring.splitlines()[0].replace("|", "\\|")


def modules(package: str) -> list[Path]:
    """Files of a package: those of a folder first, then its subfolders; `__init__` leads."""
    paths = (ROOT / package).rglob("*.py")
    return sorted(paths, key=lambda path: (path.parent, path.name != "__init__.py", path.name))


def table(package: str) -> str:
    lines = [f"## {package}", "", "| file | content |", "| --- | --- |"]
    for path in modules(package):
        lines.append(f"| `{path.relative_to(ROOT).as_posix()}` | {summary(path)} |")
    return "\n".join(lines)


def tests() -> str:
    """One line per folder of tests; each mirrors the package of its name."""
    folders = sorted({path.parent for path in (ROOT / TESTS).rglob("test_*.py")})
    lines = [f"## {TESTS}", "", "| folder | test files |", "| --- | --- |"]
    for folder in folders:
        names = ", ".join(f"`{path.stem[5:]}`" for path in sorted(folder.glob("test_*.py")))
        lines.append(f"| `{folder.relative_to(ROOT).as_posix()}/` | {names} |")
    return "\n".join(lines)


def page() -> str:
    return "\n\n".join([HEAD.strip(), *map(table, PACKAGES), tests()]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
