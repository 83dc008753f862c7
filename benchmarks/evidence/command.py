"""The command line of some parts of the evidence: measure, plan, print tables, or check rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import again
from benchmarks.evidence.frame import (
    RESULTS,
    WORK,
    Cell,
    Part,
    done,
    draw,
    matching,
    planned,
    read,
    run,
)
from benchmarks.recorder import command_output

Cells = list[tuple[Part, Cell]]


def main(parts: Sequence[Part], arguments: Sequence[str] | None = None) -> None:
    """Measure the cells that have no row, or measure once more some that have one."""
    args = parse([part.name for part in parts], arguments)
    chosen = [part for part in parts if part.name in args.part]
    if args.again:
        check(chosen, args)
    elif args.table:
        for part in chosen:
            for table in part.tables.values():
                print(table(read(args.out / part.file)), end="\n\n")
    else:
        todo = cells(chosen, args.only, args.out, known=False)
        measure(todo, args.work, args.out, args.plan)
        if not todo and cells(chosen, args.only, args.out, known=True):
            print("Each has a row; --again measures cells once more and compares.")
        for part in () if args.plan else chosen:
            draw(part, args.out)


def check(parts: Sequence[Part], args: argparse.Namespace) -> None:
    """Measure cells that have a row once more, into another folder, and compare."""
    picked = again.sampled(cells(parts, args.only, args.out, known=True), args.sample, args.draw)
    if not picked:
        raise SystemExit(f"no row in {args.out} matches --only {' '.join(args.only)}; see --table")
    folder = again.folder(args.work, command_output("git", "rev-parse", "HEAD"))
    if not args.table:
        todo = [(part, cell) for part, cell in picked if cell.name not in done(part, folder)]
        measure(todo, folder, folder, args.plan)
    if not args.plan:
        print(again.report(picked, args.out, folder))
        print(f"\nNew rows: {folder}. Remove it to measure them anew.")


def cells(parts: Sequence[Part], patterns: Sequence[str], out: Path, *, known: bool) -> Cells:
    """The cells that match a pattern and have a row, or those of them that have none."""
    found: Cells = []
    for part in parts:
        names = done(part, out)
        found += [(part, c) for c in matching(part, patterns) if (c.name in names) == known]
    return found


def measure(todo: Cells, work: Path, out: Path, plan: bool) -> None:
    """Say what is to be measured, and measure it unless this is only a plan."""
    if plan:
        for part, cell in todo:
            print(f"{cell.minutes:5.2f}  {part.name}  {cell.name}")
    print(f"{len(todo)} cells, {planned(todo):.0f} minutes on one quiet core", flush=True)
    if not plan:
        run(todo, work, out)


def parse(names: Sequence[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the cells that have no row yet.")
    parser.set_defaults(part=list(names))
    if len(names) > 1:
        parser.add_argument("--part", nargs="+", choices=names)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names of cells")
    parser.add_argument("--plan", action="store_true", help="list the cells, and run none")
    parser.add_argument("--table", action="store_true", help="print the tables, and run none")
    parser.add_argument(
        "--again", action="store_true",
        help="measure cells that have a row once more, in a folder in --work, and compare",
    )  # fmt: skip
    parser.add_argument("--sample", type=int, metavar="N", help="--again: N cells drawn at random")
    parser.add_argument("--draw", type=int, default=0, metavar="SEED", help="seed of that draw")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of models and rollouts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    args = parser.parse_args(arguments)
    if args.sample is not None and (not args.again or args.sample < 1):
        parser.error("--sample takes a number of at least 1, and --again")
    return args
