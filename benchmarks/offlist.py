"""How much of the gradient lies outside the lists, and in how many rows?

    python -m benchmarks.offlist [--work DIR] [--out DIR]
    python -m benchmarks.offlist --name NAME --cache DIR --start FOLDER [--end FOLDER] [--k K ...]

The gradient of the reverse KL with a tail bucket, with respect to the logits of one row, has K
entries of its own at the listed ids and is one number times the student's probabilities elsewhere.
`tail` is the student's mass outside the list, `off` the L1 norm of the gradient there and `on` that
at the listed ids. Where `off` is small, a row needs no product with the whole head.

Rows come from a cache, that is from stored rollouts, at the start and at the end of distillation; a
shorter list is the beginning of the stored one. Without arguments, the demo's models are trained
first. With them, any student and the cache of its rollouts can be measured. For each list length,
one JSON line has the quantiles, a sample of rows for `benchmarks.measured_rows`, and

* `share`: sum of off / sum of (on + off);
* `dense`: the share of rows left if the smallest `off` are dropped while their sum stays within a
  tolerance times the sum of what is kept.

The lines of a model replace its former ones in `offlist.jsonl`, and `offlist.svg` is drawn.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measured_rows import FIELDS, NAME, RESULTS
from benchmarks.recorder import ROOT, identity
from lopd.models.load import load_model
from lopd.store import TeacherCache
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.step import model_inputs

LISTS = (8, 32, 64, 128)
DEMO = "demo"
DEMO_LISTS = (2, 4, 8)  # of 28 ids
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
TOLERANCES = (1e-2, 1e-3)
SAMPLE = 200
SEQUENCES = 8  # in a batch


def row_masses(
    logits: Tensor,  # [N, V]
    ids: Tensor,  # [N, K], -1 where a list is shorter
    logprobs: Tensor,  # [N, K], the teacher's
    teacher_tail: Tensor,  # [N], log
) -> dict[str, Tensor]:
    """Values [N] of each row: its masses `on` and `off`, its loss and the four `FIELDS`."""
    student, places = logits.log_softmax(1), ids.clamp(min=0)
    listed = student.gather(1, places).masked_fill(ids < 0, -torch.inf)
    outside = torch.ones_like(student, dtype=torch.bool)
    outside &= ~torch.zeros_like(outside).scatter_(1, places, ids >= 0)
    tail = student.masked_fill(~outside, -torch.inf).logsumexp(1)
    ratio = (listed - logprobs).masked_fill(ids < 0, 0.0)
    tail_ratio = torch.where(tail > -torch.inf, tail - teacher_tail, 0.0)
    mass, tail_mass = listed.exp(), tail.exp()
    loss = (mass * ratio).sum(1) + tail_mass * tail_ratio
    within = listed.log_softmax(1).exp()
    teacher = logprobs.masked_fill(ids < 0, -torch.inf).logsumexp(1)
    return {
        "on": (mass * (ratio - loss[:, None]).abs()).sum(1),
        "off": tail_mass * (tail_ratio - loss).abs(),
        "loss": loss,
        "student_tail": tail_mass,
        "teacher_tail": teacher_tail.exp(),
        "first": within.amax(1),
        "list_kl": (within * ratio).sum(1) - listed.logsumexp(1) + teacher,
    }


@torch.no_grad()
def measure(
    model: Any, cache: TeacherCache, lists: list[int], count: int
) -> dict[int, dict[str, Tensor]]:
    """By list length, `row_masses` of the first `count` rows of a cache."""
    data, collate = SequenceDataset(cache), Collator()
    found: dict[int, list[dict[str, Tensor]]] = {k: [] for k in lists}
    rows = 0
    for part in torch.arange(len(data)).split(SEQUENCES):
        batch = collate(data.__getitems__(part.tolist()))
        logits = model(**model_inputs(batch)).logits.flatten(0, 1)[batch["loss_index"]]
        logits = logits.double() / cache.manifest.temperature
        ids, logprobs = batch["topk_ids"], batch["topk_logprobs"].double()
        logprobs = logprobs.masked_fill(ids < 0, -torch.inf)
        tail = batch["tail_logprobs"].double()[:, None]
        for k in lists:
            tails = torch.cat([logprobs[:, k:], tail], 1).logsumexp(1)
            found[k].append(row_masses(logits, ids[:, :k], logprobs[:, :k], tails))
        rows += len(logits)
        if rows >= count:
            break
    return {
        k: {name: torch.cat([each[name] for each in parts])[:count] for name in parts[0]}
        for k, parts in found.items()
    }


def dense_share(on: Tensor, off: Tensor, tolerance: float) -> float:
    """The share of rows that are left when the smallest are dropped within a tolerance."""
    dropped = off.sort().values.cumsum(0)
    kept = on.sum() + off.sum() - dropped
    return 1.0 - float((dropped <= tolerance * kept).double().mean())


def summary(rows: dict[str, Tensor]) -> dict[str, Any]:
    on, off, count = rows["on"], rows["off"], len(rows["on"])
    where = torch.tensor(QUANTILES, dtype=on.dtype)
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SAMPLE]
    columns = torch.stack([rows[name][some] for name in FIELDS], 1)
    return {
        "rows": count,
        "share": float(off.sum() / (on + off).sum()),
        "dense": {f"{x:g}": dense_share(on, off, x) for x in TOLERANCES},
        "mean_tail": float(rows["student_tail"].mean()),
        "kl": float(rows["loss"].mean()),
        "quantiles": QUANTILES,
        "tail": _short(rows["student_tail"].quantile(where)),
        "off": _short(off.quantile(where)),
        "curve": _short(_left(off)),
        "sample": [_short(row) for row in columns],
    }


def _left(off: Tensor, points: int = 101) -> Tensor:
    """The share of the off-list mass in the rows outside the densest x, for x in [0, 1]."""
    done = torch.cat([off.new_zeros(1), off.sort(descending=True).values.cumsum(0)])
    places = torch.linspace(0, len(off), points).long()
    return 1.0 - done[places] / done[-1]


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]


def demo_models(work: Path) -> tuple[dict[str, str], str]:
    """The demo's student at the start and at the end, and a cache of the longest lists."""
    from benchmarks.evidence.frame import Shared

    shared = Shared(work, seed=0)
    shared.scores.run()
    shared.distillation.run()
    return {"start": shared.demo.path("sft"), "end": shared.distillation.config.out}, shared.cache(
        DEMO_LISTS[-1]
    )


def rows_of(
    name: str, models: dict[str, str], path: str, lists: list[int], count: int, command: str
) -> Iterator[dict[str, Any]]:
    environment = identity(torch.device("cpu"), None)
    cache = TeacherCache.open(path, support="list")
    if max(lists) > cache.manifest.k:
        raise SystemExit(f"{path} has lists of {cache.manifest.k}; found --k {max(lists)}")
    for at, folder in models.items():
        model = load_model(folder, dtype="float32", device="cpu").eval()
        for k, rows in measure(model, cache, lists, count).items():
            setting = {"model": name, "at": at, "k": k, "vocab": model.config.vocab_size}
            yield {**setting, **summary(rows), "command": command, **environment}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the distribution of the tail, and what lies outside the lists."""
    lines = [
        "| model | k | KL | tail: mean | median | 90 % | 99 % | gradient outside "
        "| dense rows at 1e-2 | at 1e-3 |",
        f"| --- |{' ---: |' * 9}",
    ]
    for row in rows:
        tail = dict(zip(row["quantiles"], row["tail"], strict=True))
        cells = [
            f"{row['model']}, {row['at']}",
            f"{row['k']}",
            f"{row['kl']:.2g}",
            f"{row['mean_tail']:.1%}",
            *(f"{tail[q]:.2g}" for q in (0.5, 0.9, 0.99)),
            f"{row['share']:.1%}",
            *(f"{row['dense'][f'{x:g}']:.0%}" for x in TOLERANCES),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The distribution of the tail, and the off-list mass left when dense rows are taken first."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.9), layout="constrained")
    tails, left = figure.subplots(1, 2)
    names = list(dict.fromkeys((row["model"], row["k"]) for row in rows))
    for row in rows:
        colour = f"C{names.index((row['model'], row['k']))}"
        style = {"color": colour, "linestyle": "-" if row["at"] == "start" else ":"}
        label = f"{row['model']}, k = {row['k']}" if row["at"] == "start" else None
        sample = sorted(max(x[0], 1e-9) for x in row["sample"])
        tails.plot(sample, torch.linspace(0, 1, len(sample)), label=label, **style)
        left.plot(torch.linspace(0, 1, len(row["curve"])), row["curve"], **style)
    tails.set(xscale="log", xlabel="student's mass outside the list", ylabel="share of rows below")
    left.set(
        yscale="log", ylim=(1e-4, 1), xlabel="share of rows kept dense",
        ylabel="off-list gradient left out",
    )  # fmt: skip
    figure.legend(
        loc="outside lower center", ncols=4, fontsize=7, title="solid: start; dotted: end",
        title_fontsize=7,
    )  # fmt: skip
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "offlist"}):
        figure.savefig(path, metadata={"Date": None})


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default=DEMO, help="of the model, in the rows")
    parser.add_argument("--start", help="folder of the student that made the rollouts")
    parser.add_argument("--end", help="folder of the distilled student")
    parser.add_argument("--cache", help="the teacher's scores of these rollouts")
    parser.add_argument("--k", type=int, nargs="+", help="lengths of the lists")
    parser.add_argument("--rows", type=int, default=20000, help="rows of the cache to measure")
    parser.add_argument("--work", type=Path, default=Path("build/evidence"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if (args.start is None) != (args.cache is None):
        parser.error("--start and --cache belong together")
    if args.start is None:
        models, cache = demo_models(args.work)
        lists, command = args.k or DEMO_LISTS, "python -m benchmarks.offlist"
    else:
        models, cache = {"start": args.start, "end": args.end}, args.cache
        models = {at: folder for at, folder in models.items() if folder is not None}
        lists, command = (
            args.k or LISTS,
            f"python -m benchmarks.offlist --name {args.name!r} --start STUDENT --cache CACHE",
        )
    new = list(rows_of(args.name, models, cache, list(lists), args.rows, command))
    path = args.out / NAME
    kept = [row for row in read(path) if row["model"] != args.name]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *new]), encoding="utf-8")
    folder = ROOT / "docs" if args.out == RESULTS else args.out
    draw(read(path), folder / "offlist.svg")
    print(table(new))


if __name__ == "__main__":
    main()
