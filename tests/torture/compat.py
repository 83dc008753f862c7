"""The oldest and the newest packages, and the Pythons: `python -m torture.compat`, from tests/.

Each environment is made in build/compat, with packages as pyproject.toml admits them, and runs a
fixed slice of the tests. A DeprecationWarning that our own code raises is an error there. `--write`
puts the table into docs/reliability.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "compat"
ROWS = ROOT / "benchmarks" / "results" / "compat.jsonl"
SHOWN = ("torch", "transformers", "accelerate", "numpy", "safetensors")
TOOLS = ("pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.100")
EXTRAS = ("train", "parquet", "peft")
SLICE = (
    "kernels/test_divergence.py",
    "models/test_head.py",
    "engines/test_transformers.py",
    "store/test_readers_and_writers.py",
    "store/test_mapped.py",
    "provenance/test_fingerprint.py",
    "data/test_external_scores.py",
    "training/test_trainer.py",
    "training/test_checkpoints.py",
    "stages/test_stages.py",
)
MARKS = "not thorough and not slow and not gpu and not vllm"


@dataclass(frozen=True)
class Row:
    """An environment: which Python, and which packages of those that are admitted."""

    name: str
    python: str
    packages: str  # "oldest", "constraints" (those of constraints/cpu.txt) or "newest"


ALL = (
    Row("oldest", "3.10", "oldest"),
    Row("as tested", "3.12", "constraints"),
    Row("newest", "3.13", "newest"),
)


def requirements(kind: str) -> list[str]:
    """What pip is asked for."""
    listed = _listed((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if kind == "oldest":
        return [re.sub(r">=([0-9.]+).*", r"==\1", item) for item in listed]
    constraints = ["-c", str(ROOT / "constraints" / "cpu.txt")] if kind == "constraints" else []
    return [*constraints, *(["--upgrade"] if kind == "newest" else []), *listed]


def _listed(text: str) -> list[str]:
    """The dependencies of lopd and of its extras EXTRAS. Python 3.10 has no reader of TOML."""
    found: list[str] = []
    for name in ("dependencies", *EXTRAS):
        match = re.search(rf"^{name} = \[(.*)\]$", text, re.MULTILINE)
        assert match is not None, name
        found += json.loads(f"[{match[1]}]")
    return found


def make(row: Row) -> Path:
    """The Python of the environment, which is made unless it is there."""
    folder = FOLDER / row.name.replace(" ", "-")
    python, done = folder / "bin" / "python", folder / ".done"
    if not done.exists():
        found = shutil.which(f"python{row.python}")
        if found is None:
            raise SystemExit(f"python{row.python}: not on PATH; install it, or name other rows")
        subprocess.run([found, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, *requirements(row.packages), *TOOLS], check=True)
        done.touch()
    return python


def run(row: Row) -> dict[str, object]:
    """Versions, and how many tests of the slice passed and failed."""
    python = make(row)
    versions = (
        "import importlib.metadata as m, json, platform;"
        f"print(json.dumps({{n: m.version(n) for n in {SHOWN}}} | "
        "{'python': platform.python_version()}))"
    )
    found = json.loads(subprocess.check_output([python, "-c", versions], text=True))
    files = [str(ROOT / "tests" / name) for name in SLICE]
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARKS, *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout)
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", last)}
    if done.returncode not in (0, 1):
        counts["error"] = counts.get("error", 0) or 1
    return {"name": row.name, **found, **counts}


def markdown(rows: list[dict[str, object]]) -> str:
    """One line for each environment."""
    head = ["packages", "Python", *SHOWN, "passed", "failed"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * 7)} | ---: | ---: |"]
    for row in rows:
        failed = int(str(row.get("failed", 0))) + int(str(row.get("error", 0)))
        cells = [row["name"], row["python"], *(row[name] for name in SHOWN)]
        lines.append(f"| {' | '.join(map(str, cells))} | {row.get('passed', 0)} | {failed} |")
    return "\n".join(lines)


def main() -> int:
    """Run the rows that are named, all by default."""
    parser = argparse.ArgumentParser(prog="python -m torture.compat", description=__doc__)
    parser.add_argument("rows", nargs="*", help="names of rows; all by default")
    parser.add_argument("--write", action="store_true", help="update docs/reliability.md")
    options = parser.parse_args()
    former = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    known = {str(row["name"]): row for row in former}
    failed = False
    for row in ALL:
        if not options.rows or row.name in options.rows:
            known[row.name] = found = run(row)
            failed |= "failed" in found or "error" in found
            ROWS.write_text(
                "".join(json.dumps(known[r.name]) + "\n" for r in ALL if r.name in known)
            )
    table = markdown([known[row.name] for row in ALL if row.name in known])
    print(table)
    if options.write:
        from torture.document import write_blocks

        write_blocks({"compat": table})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
