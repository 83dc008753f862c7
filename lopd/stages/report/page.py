"""The report as HTML. Every text goes through `escape`; answers are data of the page's script."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from lopd.evaluation.accuracy import Z95
from lopd.evaluation.results import accuracies
from lopd.provenance.typed_json import value_at
from lopd.stages.report.charts import histogram, line_chart
from lopd.stages.report.facts import PLANNED, Evaluation, Run, curves_of
from lopd.stages.report.memory import Memory

WORST = 20
ENDS = {"stop": "ended by themselves", "length": "cut off at the length limit"}


def render(
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    answers: Sequence[Mapping[str, Any]],
    lengths: Sequence[Mapping[str, Any] | None],
    memory: Sequence[Memory | None],
) -> str:
    """The page, which needs nothing but itself.

    Args:
        answers: as `lopd.stages.report.describe_answer` makes them.
        lengths: of the cached answers of each run, None without a cache.
        memory: of each run, None where it cannot be planned.
    """
    names = " and ".join(run.name for run in runs)
    body = [
        f"<h1>{escape(names)}</h1>",
        _headline(runs),
        _section("Where it comes from", "".join(_pipeline(run) for run in runs)),
        _section("Training", _legend(runs) + _curves(runs)),
        _section("Evaluation", _evaluations(runs, evaluations)) if evaluations else "",
        _section("Answers, token by token", _tokens(answers)) if answers else "",
        _section("Lengths and ends of the cached answers", _lengths(runs, lengths)),
        _section("Memory of training", _memory(runs, memory)) if any(memory) else "",
        _section("Settings", _settings(runs)),
    ]
    return _resource("page.html").format(
        title=escape(f"lopd: {names}"),
        style=_resource("page.css"),
        script=_resource("page.js"),
        body="\n".join(body),
        data=_json_in_html([dict(answer) for answer in answers]),
    )


def _resource(name: str) -> str:
    return (files("lopd.stages.report") / name).read_text(encoding="utf-8")


def _json_in_html(value: Any) -> str:
    """JSON that cannot end the script element it stands in, without half characters."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace").decode()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(rows: Iterable[Sequence[Any]], header: Sequence[Any] = ()) -> str:
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    lines = [f"<thead><tr>{head}</tr></thead>"] if head else []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(_words(cell))}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _words(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _headline(runs: Sequence[Run]) -> str:
    """What each run reached, in one line."""
    return "".join(f'<p class="lead">{escape(headline(run))}</p>' for run in runs)


def headline(run: Run) -> str:
    """The start and the end of the held-out divergence, or of the objective."""
    if isinstance(value_at(run.reports, "holdout.best"), Mapping):
        holdout = run.reports["holdout"]
        start = holdout.get("start")
        began = f"from {start:.4g} " if isinstance(start, float) else ""
        best = holdout["best"]
        return (
            f"{run.name}: divergence on held-out sequences {began}to {best['kl']:.4g} nat per "
            f"token at step {best['step']} (a lower bound: ids outside the lists count as one)"
        )
    loss = run.curves.get("loss", [])
    if not loss:
        return f"{run.name}: no step was logged"
    return (
        f"{run.name}: objective from {loss[0][1]:.4g} to {loss[-1][1]:.4g} nat per token at step "
        f"{loss[-1][0]}; nothing was held out (--holdout)"
    )


def _pipeline(run: Run) -> str:
    boxes = "".join(
        f"<li><b>{escape(role)}</b><span>{escape(text)}</span></li>" for role, text in run.steps
    )
    environment = ", ".join(f"{name} {value}" for name, value in run.environment.items())
    return (
        f"<h3>{escape(run.name)}: {escape(run.stage)}, {escape(run.created)}</h3>"
        f'<ol class="pipeline">{boxes}</ol><p class="small">{escape(environment)}</p>'
    )


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    names = "".join(
        f'<span class="key s{i}">{escape(run.name)}</span>' for i, run in enumerate(runs)
    )
    return f'<p class="legend">{names}</p>'


def _curves(runs: Sequence[Run]) -> str:
    charts = []
    for column, (title, unit) in curves_of(runs).items():
        series = [(run.name, run.curves.get(column, [])) for run in runs]
        if column == "peak_mib":
            series += [(f"plan of {run.name}", run.curves.get(PLANNED, [])) for run in runs]
        if any(points for _, points in series):
            caption = f"{title}, {unit}" if unit else title
            chart = line_chart(series)
            charts.append(f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(charts)}</div>'


def _evaluations(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    """A table of measures in words, with intervals of 95 %, and accuracies by length."""
    bases = {run.base for run in runs}
    names = {
        run.base: f"student before {run.name}" if len(bases) > 1 else "student before"
        for run in runs
        if run.base
    }
    names |= {run.weights: run.name for run in runs}
    titles = [names.get(e.weights, Path(e.folder).name) for e in evaluations]
    header = [""]
    for title, evaluation in zip(titles, evaluations, strict=True):
        several = titles.count(title) > 1  # evaluations of one model, by other prompts or settings
        header.append(f"{title} ({Path(evaluation.folder).name})" if several else title)
    measures: dict[str, dict[str, str]] = {}
    for evaluation in evaluations:
        for name, words in measured(evaluation.results):
            measures.setdefault(name, {})[evaluation.folder] = words
    rows = [
        (name, *(found.get(e.folder, "") for e in evaluations)) for name, found in measures.items()
    ]
    parts = [_table(rows, header), '<p class="small">In brackets the interval of 95 %.</p>']
    for name, evaluation in zip(header[1:], evaluations, strict=True):
        by_length = [
            (
                f"{row['shortest']} to {row['longest']}",
                row["count"],
                f"{row['accuracy']:.3f}",
                f"{row['truncated']:.1%}",
            )
            for row in evaluation.results.get("by_length", ())
        ]
        if by_length:
            head = ["tokens", "answers", "right", "cut off"]
            table = _table(by_length, head)
            title = escape(f"Sampled answers of {name}, by length")
            parts.append(f"<details><summary>{title}</summary>{table}</details>")
    return "".join(parts)


def measured(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The measures of an evaluation by name, in words."""
    for name in accuracies(results):
        value = results[name]
        kind, _, number = name.partition("@")
        title = {
            "greedy": "right, greedy",
            "avg": f"right, sampled, mean of {number} answers",
            "pass": f"right at least once in {number} (pass@{number})",
        }[kind]
        words = f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        yield title, words
    for name, title in (
        ("kl", "KL to the teacher on its own answers, nat per token"),
        ("cache_kl", "KL to the teacher on stored answers, nat per token"),
    ):
        if (found := results.get(name)) is not None:
            value, error = found["nats_per_token"], found.get("standard_error")
            bound = "" if found.get("exact") else "at least "
            spread = "" if error is None else _interval(value, Z95 * error)
            yield title, f"{bound}{value:.4f}{spread}"
    for name, title, form in (
        ("truncated", "sampled answers that were cut off", ".1%"),
        ("no_answer", "sampled answers in which nothing was found to grade", ".1%"),
        ("mean_tokens", "tokens of an answer, mean", ".1f"),
        ("prompts", "prompts", "d"),
        ("samples", "sampled answers to each prompt", "d"),
    ):
        if results.get(name) is not None:
            yield title, format(results[name], form)


def _interval(value: float, spread: float) -> str:
    return f" [{max(0.0, value - spread):.4f}, {value + spread:.4f}]"


def _tokens(answers: Sequence[Mapping[str, Any]]) -> str:
    """The viewer, which the script fills, and a table of the worst tokens."""
    worst = sorted(
        (
            (answer["divergence"][i], answer, i)
            for answer in answers
            for i in range(len(answer["tokens"]))
        ),
        key=lambda found: -found[0],
    )[:WORST]
    numbers = {id(answer): number for number, answer in enumerate(answers)}
    lines = ""
    for value, answer, i in worst:
        button = f'<button class="jump" data-answer="{numbers[id(answer)]}" data-token="{i}">'
        cells = (
            _in_context(answer["tokens"], i),
            escape(_top(answer["teacher"][i])),
            escape(_top(answer["model"][i])),
            f"{button}show</button> {escape(answer['run'])}: {escape(answer['title'])}",
        )
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        lines += f'<tr><th scope="row">{value:.3f}</th>{row}</tr>'
    header = ("nat", "token in its place", "teacher's first", "model's first", "answer to")
    head = "".join(f"<th>{name}</th>" for name in header)
    table = f'<table class="worst"><thead><tr>{head}</tr></thead>{lines}</table>'
    return (
        '<p class="small">Each token has the colour of its divergence: pale is agreement. Point at '
        "a token, tap it, or move with the arrow keys to see both lists.</p>"
        '<div id="viewer"><noscript>The tokens are shown by a script; the table below needs none.'
        "</noscript></div><h3>Tokens with the largest divergence</h3>"
        f'<div class="scroll">{table}</div>'
    )


def _in_context(tokens: Sequence[str], i: int) -> str:
    """A token, marked, with the end of what precedes it."""
    before = "".join(tokens[max(0, i - 8) : i])[-24:]
    return f"{escape(before)}<mark>{escape(tokens[i]) or '&empty;'}</mark>"


def _top(listed: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{text!r} {math.exp(lp):.1%}" for text, lp in listed[:3])


def _lengths(runs: Sequence[Run], lengths: Sequence[Mapping[str, Any] | None]) -> str:
    parts = []
    for run, found in zip(runs, lengths, strict=True):
        if found is None:
            parts.append(f"<p>{escape(run.name)}: without its cache, unknown</p>")
            continue
        values, ends = sorted(found["lengths"]), found["ends"]
        how = ", ".join(f"{ENDS.get(n, n)} {c / len(values):.1%}" for n, c in ends.items() if c)
        median, ninety = (values[int(share * (len(values) - 1))] for share in (0.5, 0.9))
        caption = (
            f"{run.name}: {len(values)} answers, {sum(values) / len(values):.1f} tokens on "
            f"average, median {median}, 90 % at most {ninety}, longest {values[-1]}; {how}"
        )
        chart = histogram(values, "tokens")
        parts.append(f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(parts)}</div>'


def _memory(runs: Sequence[Run], memory: Sequence[Memory | None]) -> str:
    """The plan by part, and the measured peak."""
    known = [(run, each) for run, each in zip(runs, memory, strict=True) if each is not None]
    parts = list(known[0][1].planned)
    rows = [(part, *(_mib(each.planned.get(part)) for _, each in known)) for part in parts]
    peaks = [_mib(each.measured) or "not measured (no GPU)" for _, each in known]
    header = ["planned, MiB", *(run.name for run, _ in known)]
    note = (
        '<p class="small">What <code>lopd plan</code> computes for one device from the settings '
        "below, for sequences as long as the longest of the cache.</p>"
    )
    return _table([*rows, ("measured peak", *peaks)], header) + note


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f}"


def _settings(runs: Sequence[Run]) -> str:
    """Settings of all runs; those that differ come first."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    differ = [n for n in names if any(v != values[n][0] for v in values[n])]
    same = [name for name in names if name not in differ]
    header = ["", *(run.name for run in runs)]
    content = ""
    if differ:
        content += "<h3>That differ</h3>" + _table(((n, *values[n]) for n in differ), header)
    content += "<details><summary>All that are the same</summary>"
    return content + _table((n, values[n][0]) for n in same) + "</details>"
