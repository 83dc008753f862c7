"""Attack lopd: `python -m torture` runs the campaign, `--slice` the part that CI runs.

Both are seeded and end with a table of fault, tried, survived and lost; the exit code is 1 if
anything was lost. With `--rows FILE` every attack is a line of that file, and a campaign that was
stopped goes on; the table then counts the whole file. `--write` puts the tables of the parts that
ran into docs/reliability.md.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from torture import harness
from torture.document import write_blocks
from torture.rows import Rows, commit
from torture.table import Table

PACKAGES = ("torch", "transformers", "numpy", "safetensors")


PARTS = ("attacks", "numbers", "mistakes", "load")


def main() -> int:
    """Run the parts that the arguments name, and print what they found."""
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000, help="other attacks by their share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slice", action="store_true", help="about a minute, for CI")
    parser.add_argument("--only", choices=PARTS, help="one part of the campaign")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder otherwise")
    parser.add_argument("--rows", type=Path, help="file of the attacks; a stopped one goes on")
    parser.add_argument("--seconds", type=float, help="end the attacks after this time")
    parser.add_argument("--write", action="store_true", help="update docs/reliability.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = options.folder or Path(temporary)
        os.environ["XDG_CACHE_HOME"] = str(root / "memo")
        table, began = Table(), time.monotonic()
        blocks = attack(root, options, table)
    for fault, stage, problem in table.lost:
        print(f"LOST: {fault}: {stage}: {problem}")
    print(f"{len(table.entries)} attacks in {time.monotonic() - began:.0f} s")
    print(table.markdown())
    if options.write:
        write_blocks(blocks)
    return 1 if table.lost else 0


def attack(root: Path, options: argparse.Namespace, table: Table) -> dict[str, str]:
    """Run the parts in turn; returns the blocks of docs/reliability.md."""
    harness.warm_up()
    from torture import load, mistakes, numerics
    from torture.pipeline import Pipeline, clear

    parts = PARTS if options.only is None else (options.only,)
    blocks = {}
    clear(root / "pipeline")
    pipeline = None
    if parts != ("load",):
        pipeline = Pipeline(root / "pipeline", whole="attacks" in parts and not options.slice)
    if pipeline and "attacks" in parts:
        rows = Rows(options.rows)
        _attack_stages(pipeline, table, rows, options)
        block = rows.markdown(table)
        blocks["campaign"] = f"{_versions()}, seed {options.seed}. {block}"
    if pipeline and "numbers" in parts and not options.slice:
        blocks["numbers"] = numerics.markdown(numerics.attack_all(pipeline, table))
    if pipeline and "mistakes" in parts:
        blocks["mistakes"] = mistakes.markdown(mistakes.make_all(pipeline, table))
    if "load" in parts:
        sizes = load.SLICE if options.slice else load.WHOLE
        blocks["load"] = load.markdown(load.measure_all(root, table, sizes))
    return blocks


def _attack_stages(pipeline, table: Table, rows: Rows, options: argparse.Namespace) -> None:
    """Attacks on running stages and on their files; Ctrl-C ends them early."""
    from torture.disks import Disks
    from torture.flips import Flips
    from torture.interruptions import Interruptions

    kills, seed = 8 if options.slice else options.kills, options.seed
    version, ends = commit(), time.monotonic() + (options.seconds or float("inf"))
    runs, disks = Interruptions(pipeline, table, seed), Disks(pipeline, table, seed)
    flips = Flips(pipeline, table, seed)
    shares: dict[Callable[[int], None], float] = {
        runs.kill: 1,
        runs.ask_to_stop: 1 / 8,
        runs.lose_workers: 1 / 16,
        runs.share_a_folder: 1 / 16,
        disks.fill: 1 / 16,
        disks.limit_files: 1 / 16,
        disks.make_read_only: 1 / 32,
        flips.flip_artefact: 1 / 4,
        flips.flip_checkpoint: 1 / 8,
    }
    counts = {method: max(4, round(kills * share)) for method, share in shares.items()}
    # Evenly mixed, so that a campaign that is cut short has some of each.
    order = [
        ((n + 0.5) / count, n, method) for method, count in counts.items() for n in range(count)
    ]
    try:
        for _, number, method in sorted(order, key=lambda entry: entry[0]):
            attack, first = f"{method.__name__} {number}", len(table.entries)
            if attack in rows.done:
                continue
            if time.monotonic() > ends:
                break
            method(number)
            rows.add(attack, version, table, first)
            for fault, stage, problem in table.entries[first:]:
                if problem:
                    print(f"LOST: {fault}: {stage}: {problem}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("ended early", file=sys.stderr)


def _versions() -> str:
    packages = (f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {', '.join(packages)}"


if __name__ == "__main__":
    sys.exit(main())
