"""Attack lopd: `python -m torture` runs the campaign, `--slice` the part that CI runs.

Both are seeded and end with a table of fault, tried, survived and lost; the exit code is 1 if
anything was lost. `--write` puts the tables into docs/reliability.md.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torture import harness
from torture.table import Table

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"
PACKAGES = ("torch", "transformers", "numpy", "safetensors")


def main() -> int:
    """Run the attacks that the arguments name, and print what they found."""
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=1000, help="kills; other attacks by their share"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slice", action="store_true", help="about a minute, for CI")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder otherwise")
    parser.add_argument("--write", action="store_true", help="update docs/reliability.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(root / "memo")
        return attack(root, options)


def attack(root: Path, options: argparse.Namespace) -> int:
    """All attacks in turn; returns the exit code."""
    harness.warm_up()
    from torture import load, mistakes, numerics
    from torture.disks import Disks
    from torture.flips import Flips
    from torture.interruptions import Interruptions
    from torture.pipeline import Pipeline, clear

    table, began = Table(), time.monotonic()
    clear(root / "pipeline")
    pipeline = Pipeline(root / "pipeline")
    runs = Interruptions(pipeline, table, options.seed)
    disks = Disks(pipeline, table, options.seed)
    flips = Flips(pipeline, table, options.seed)
    kills = 8 if options.slice else options.kills
    share = {
        runs.kill: 1,
        runs.ask_to_stop: 1 / 4,
        runs.lose_workers: 1 / 8,
        runs.share_a_folder: 1 / 8,
        disks.fill: 1 / 8,
        disks.limit_files: 1 / 8,
        disks.make_read_only: 1 / 16,
        flips.flip_artefact: 1,
        flips.flip_checkpoint: 1 / 4,
    }
    for method, part in share.items():
        repeat(method, max(4, round(kills * part)), table)
    made = mistakes.make_all(pipeline, table)
    if not options.slice:
        numerics.attack_all(pipeline, table)
    sizes = load.measure_all(root, table, load.SLICE if options.slice else load.WHOLE)
    seconds = time.monotonic() - began
    for fault, stage, problem in table.lost:
        print(f"LOST: {fault}: {stage}: {problem}")
    print(f"{sum(table.tried.values())} attacks in {seconds:.0f} s, seed {options.seed}")
    print(table.markdown())
    if options.write:
        _write(
            {
                "campaign": f"{_versions()}; `python -m torture --kills {options.kills} --seed "
                f"{options.seed}`.\n\n{table.markdown()}",
                "load": load.markdown(sizes),
                "mistakes": mistakes.markdown(made),
            }
        )
    return 1 if table.lost else 0


def repeat(method: Callable[[int], None], count: int, table: Table) -> None:
    """Call an attack `count` times; say what was lost as soon as it is."""
    known = len(table.lost)
    for number in range(count):
        method(number)
        for fault, stage, problem in table.lost[known:]:
            print(f"LOST: {fault}: {stage}: {problem}", file=sys.stderr, flush=True)
        known = len(table.lost)


def _versions() -> str:
    packages = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {', '.join(packages)}"


def _write(blocks: dict[str, str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, block in blocks.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda _, s=start, b=block, e=end: f"{s}\n\n{b}\n\n{e}", text)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
