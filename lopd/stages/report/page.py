"""The report as HTML. Every text goes through `escape`; answers are data of the page's script."""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from lopd.evaluation.results import accuracies
from lopd.provenance.typed_json import value_at
from lopd.stages.report.charts import histogram, line_chart
from lopd.stages.report.facts import PLANNED, Evaluation, Run, curves_of

WORST = 20


def render(
    runs: Sequence[Run],
    evaluations: Sequence[Evaluation],
    answers: Sequence[Mapping[str, Any]],
    lengths: Sequence[Mapping[str, Any] | None],
) -> str:
    """The page, which needs nothing but itself.

    Args:
        answers: as `lopd.stages.report.describe_answer` makes them.
        lengths: of the cached answers of each run, None without a cache.
    """
    names = " and ".join(run.name for run in runs)
    body = [
        f"<h1>{escape(names)}</h1>",
        _headline(runs),
        _section("Where it comes from", "".join(_pipeline(run) for run in runs)),
        _section("Training", _legend(runs) + _curves(runs)),
        _section("Evaluation", _evaluations(runs, evaluations)) if evaluations else "",
        _section("Answers, token by token", _tokens(answers)) if answers else "",
        _section("Lengths of the cached answers", _lengths(runs, lengths)),
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
    names = {run.weights: run.name for run in runs}
    measures: dict[str, dict[str, str]] = {}
    for evaluation in evaluations:
        for name, value in evaluation.results.items():
            words = None
            if name in accuracies(evaluation.results):
                words = f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
            elif name in ("kl", "cache_kl"):
                bound = "" if value.get("exact") else "at least "
                words = f"{bound}{value['nats_per_token']:.4f} nat per token"
            elif isinstance(value, (int, float)):
                words = _words(value)
            if words is not None:
                measures.setdefault(name, {})[evaluation.folder] = words
    header = ["", *(names.get(e.weights, e.folder) for e in evaluations)]
    rows = [
        (name, *(found.get(e.folder, "") for e in evaluations)) for name, found in measures.items()
    ]
    note = '<p class="small">In brackets the interval of 95 %.</p>'
    return _table(rows, header) + note


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
    rows = [
        (
            f"{value:.3f}",
            f"{answer['run']} {answer['id']}/{answer['sample']} at {i}",
            repr(answer["tokens"][i]),
            _top(answer["teacher"][i]),
            _top(answer["model"][i]),
        )
        for value, answer, i in worst
    ]
    header = ["nat", "answer", "token", "teacher's first", "model's first"]
    return (
        '<p class="small">Each token has the colour of its divergence: pale is agreement. Point at '
        "a token, tap it, or move with the arrow keys to see both lists.</p>"
        '<div id="viewer"><noscript>The tokens are shown by a script; the table below needs none.'
        "</noscript></div><h3>Tokens with the largest divergence</h3>" + _table(rows, header)
    )


def _top(listed: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{text!r} {lp:.2f}" for text, lp in listed[:3])


def _lengths(runs: Sequence[Run], lengths: Sequence[Mapping[str, Any] | None]) -> str:
    parts = []
    for run, found in zip(runs, lengths, strict=True):
        if found is None or not found["lengths"]:
            parts.append(f"<p>{escape(run.name)}: no cache</p>")
            continue
        values = sorted(found["lengths"])
        median = values[len(values) // 2]
        caption = (
            f"{run.name}: {len(values)} answers, {sum(values) / len(values):.1f} tokens on "
            f"average, median {median}, longest {values[-1]}; "
            f"{found['truncated'] / len(values):.1%} are cut off"
        )
        chart = histogram(values, "tokens")
        parts.append(f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>")
    return f'<div class="charts">{"".join(parts)}</div>'


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
