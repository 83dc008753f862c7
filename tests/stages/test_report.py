"""`lopd report`: one page that needs nothing else, whatever a model has written."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers_artefacts import VOCAB, describe, distill_config, write_cache, write_pipeline

import lopd
from lopd.cli import main
from lopd.evaluation.tokens import TokenComparison
from lopd.provenance import build_manifest, write_manifest
from lopd.stages.report import describe_answer
from lopd.stages.report.charts import histogram, line_chart
from lopd.stages.report.facts import read_run
from lopd.stages.report.memory import memory_of
from lopd.stages.report.page import headline, render

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028 {0} \ud83d"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs on one cache, with different learning rates."""
    folder = write_pipeline(tmp_path_factory.mktemp("pipeline"))
    for name, rate in (("one", 1e-3), ("two", 2e-3)):
        lopd.distill(
            lopd.DistillConfig(
                student=str(folder / "student"), cache=str(folder / "cache"),
                out=str(folder / name), max_steps=4, batch_size=4, learning_rate=rate,
                device="cpu", log_every=1, save_every=0, holdout=0.25, eval_steps=2,
            )
        )  # fmt: skip
    return folder


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def report(runs, *names, **flags):
    out = runs / "page.html"
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    folders = [str(runs / name) for name in names]
    argv = ["report", *folders, "--out", str(out), "--device", "cpu"]
    assert main([*argv, *words]) == 0
    return out.read_text(encoding="utf-8")


def answer_of(tokens, text=str):
    """An answer of made-up tokens, as the page reads it."""
    return {
        "title": text(0), "run": "one", "id": "p", "sample": 0, "finish": "stop", "prompt": text(0),
        "tokens": [text(i) for i in range(tokens)],
        "divergence": [i / tokens for i in range(tokens)],
        "teacher": [[[text(i), -0.5]] * 8 for i in range(tokens)],
        "model": [[[text(i), -0.5]] * 8 for i in range(tokens)],
        "sampled": [[-1.0, -2.0]] * tokens,
    }  # fmt: skip


def test_a_page_of_one_run(runs):
    text = report(runs, "one", answers=2)
    page = Page(text)
    answers = json.loads(page.scripts[0])
    assert len(answers) == 2 and len(page.scripts) == 2
    run = read_run(str(runs / "one"))
    assert headline(run) in text.replace("&#x27;", "'")
    assert f"{run.reports['holdout']['best']['kl']:.4g}" in headline(run)
    for answer in answers:
        count = len(answer["tokens"])
        assert all(len(answer[k]) == count for k in ("divergence", "teacher", "model", "sampled"))
        assert all(len(row) <= 8 and row for row in answer["model"])
    # a chart for each curve of the log, and the histogram of lengths
    assert sum(tag == "svg" for tag, _ in page.elements) == len(run.curves) + 1


def test_a_page_asks_for_nothing_elsewhere(runs):
    page = Page(report(runs, "one"))
    for _, attributes in page.elements:
        assert not {"src", "href", "onerror", "onclick"} & attributes.keys()
    policy = next(a["content"] for _, a in page.elements if "content" in a and "default" in str(a))
    assert policy.startswith("default-src 'none'")


def evaluation_of(runs, name, model, **results):
    """A folder as `lopd eval` writes it, with these results."""
    folder = runs / "eval" / name
    folder.mkdir(parents=True, exist_ok=True)
    manifest = build_manifest(
        "evaluation",
        stage="eval",
        config={},
        model=describe(model),
        inputs={"prompts": {"sha256": "0" * 64}},
    )
    (folder / "results.json").write_text(json.dumps({"prompts": 0, "samples": 0, **results}))
    write_manifest(folder, manifest)
    return folder


def test_evaluations_beside_a_run_are_found_and_shown_with_intervals(runs, capsys):
    rate = {"mean": 0.5, "low": 0.25, "high": 0.75}
    accuracy = {"prompts": 4, "samples": 2, "greedy": rate, "avg@2": rate, "no_answer": 0.125}
    row = {"shortest": 3, "longest": 9, "count": 8, "accuracy": 0.5, "truncated": 0.25}
    kl = {"nats_per_token": 0.25, "standard_error": 0.05, "exact": False}
    evaluation_of(runs, "after", runs / "one", kl=kl, by_length=[row], **accuracy)
    evaluation_of(runs, "before", runs / "student", kl=kl | {"nats_per_token": 0.75})
    evaluation_of(runs, "of-another", runs / "teacher", kl=kl)
    text = report(runs, "one", answers=0)
    assert "of-another" not in text
    assert "<th></th><th>student before</th><th>one</th>" in text
    assert "<td>at least 0.7500 [0.6520, 0.8480]</td><td>at least 0.2500 [0.1520" in text
    assert "<td></td><td>0.500 [0.250, 0.750]</td>" in text and "12.5%" in text
    assert "<td>8</td><td>0.500</td><td>25.0%</td>" in text
    text = report(runs, "one", answers=0, evals=runs / "eval" / "of-another")
    assert "of-another" in text and "<th>student before</th>" not in text
    assert "is of a model that is none of the runs'" in capsys.readouterr().err


def test_evaluations_that_nobody_named_do_not_end_a_report(runs, capsys):
    kl = {"nats_per_token": 0.25, "standard_error": 0.05, "exact": False}
    for name in ("first", "second"):
        evaluation_of(runs, name, runs / "one", kl=kl)
    (evaluation_of(runs, "torn", runs / "one", kl=kl) / "results.json").write_text("{")
    text = report(runs, "one", answers=0)
    assert "<th>one (first)</th><th>one (second)</th>" in text
    found = capsys.readouterr().err
    assert "torn/results.json: torn or altered" in found and "left out" in found
    assert main(["report", str(runs / "one"), "--evals", str(runs / "eval" / "torn")]) == 2
    for name in ("first", "second", "torn"):
        shutil.rmtree(runs / "eval" / name)


def test_memory_is_planned_for_the_longest_sequence_of_the_cache(runs):
    text = report(runs, "one", answers=0)
    section = text.split("Memory of training")[1].split("</section>")[0]
    cells = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', section))
    assert cells["measured peak"] == "not measured (no GPU)"
    parts = [float(cells[name].replace(",", "")) for name in cells if name != "measured peak"]
    assert parts[-1] == pytest.approx(sum(parts[:-1]), abs=len(parts))
    run = read_run(str(runs / "one"))
    planned = memory_of(run, 16, 4).planned
    assert memory_of(run, 32, 4).planned["activations"] > planned["activations"]
    broken = replace(run, settings={**run.settings, "batch_size": "many"})
    assert memory_of(broken, 16, 4) is None


def test_ids_that_the_model_has_no_row_for_count_as_others(tmp_path):
    """Teachers often have more rows of padding than their students."""
    folder, rows = write_pipeline(tmp_path), VOCAB + 40
    file = folder / "teacher/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": rows}))
    write_cache(folder / "wide", folder / "teacher", folder / "rollouts", vocab=rows)
    settings = {"max_steps": 1, "save_every": 0, "device": "cpu", "allow_teacher_mismatch": True}
    config = distill_config(folder, folder / "one", cache=str(folder / "wide"), **settings)
    lopd.distill(config)
    page = Page(report(folder, "one", answers=2))
    first = json.loads(page.scripts[0])[0]
    assert max(map(len, first["teacher"])) <= 5  # the top 4 and the sampled token
    assert not any(f"id {token}" in str(first) for token in range(VOCAB, rows))


def test_ends_of_the_cached_answers_are_counted(runs):
    text = report(runs, "one", answers=0)
    assert re.search(r"longest \d+; (ended by themselves|cut off at the length limit) \d", text)


def test_the_worst_tokens_lead_to_their_place(runs):
    run = read_run(str(runs / "one"))
    text = render([run], [], [answer_of(3), answer_of(30, lambda i: f"w{i} ")], [None], [None])
    first = text.split('<table class="worst">')[1].split("<tr>")[2]
    assert 'data-answer="1" data-token="29"' in first and "<mark>w29 </mark>" in first
    assert "w24 w25" in first and "60.7%" in first  # exp(-0.5)


def test_runs_stand_side_by_side_with_what_differs_first(runs):
    text = report(runs, "one", "two", answers=0)
    differing = text.split("That differ")[1].split("</table>")[0]
    assert "learning_rate" in differing and "<td>0.001</td><td>0.002</td>" in differing
    assert "batch_size" not in differing
    assert text.count('class="line s1"') == text.count('class="line s0"') > 5


def test_text_of_a_model_is_never_markup(runs):
    run = read_run(str(runs / "one"))
    hostile = {**answer_of(3, lambda i: HOSTILE), "id": HOSTILE}
    page = Page(render([run], [], [hostile], [None], [None]))
    assert len(page.scripts) == 2 and "img" not in {tag for tag, _ in page.elements}
    assert json.loads(page.scripts[0])[0]["tokens"] == [HOSTILE.replace("\ud83d", "?")] * 3


def test_tokens_that_decode_to_nothing_are_shown_by_their_id():
    class Tokenizer:
        def __len__(self):
            return 5

        def decode(self, ids, skip_special_tokens=False):
            return "".join(f"<{i}>" for i in ids)

    class Holder:
        name = "run"
        prompt_id, sample, finish_reason, prompt_length = "p", 0, "stop", 1
        tokens = np.array([1, 2, 7])

    holder = Holder()
    holder.rollout = holder
    comparison = TokenComparison(
        divergence=np.array([0.5, 0.1]),
        teacher_ids=np.array([[2, -1], [3, 9]]), teacher_logprobs=np.log([[0.5, 0.1], [0.4, 0.1]]),
        model_ids=np.array([[2, 3], [3, 2]]), model_logprobs=np.log([[0.5, 0.1], [0.4, 0.1]]),
        teacher_sampled=np.array([-1.0, -2.0]), model_sampled=np.array([-3.0, -4.0]),
    )  # fmt: skip
    answer = describe_answer(holder, holder, comparison, Tokenizer())
    assert answer["tokens"] == ["<2>", "id 7"]
    assert answer["teacher"] == [[["<2>", -0.693]], [["<3>", -0.916], ["id 9", -2.303]]]
    assert answer["sampled"] == [[-1.0, -3.0], [-2.0, -4.0]]


def test_bad_folders_are_refused(runs, tmp_path, capsys):
    for folder, words in ((tmp_path, "no manifest.json"), (runs / "cache", "holds 'cache'")):
        assert main(["report", str(folder)]) == 2
        assert words in capsys.readouterr().err
    assert main(["report", str(runs / "one"), "--evals", str(runs / "cache")]) == 2
    assert "lopd eval" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_a_run_whose_cache_is_gone_has_a_page(runs, tmp_path, capsys):
    shutil.copytree(runs / "one", tmp_path / "one")
    manifest = tmp_path / "one" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(runs / "cache"), "/nowhere/cache"))
    assert main(["report", str(tmp_path / "one")]) == 0
    assert "is not there" in capsys.readouterr().err
    assert "one: without its cache" in (tmp_path / "one" / "report.html").read_text()
    shutil.copytree(runs / "cache", tmp_path / "cache")  # beside the run
    assert main(["report", str(tmp_path / "one"), "--answers", "0"]) == 0
    assert "Memory of training" in (tmp_path / "one" / "report.html").read_text()
    other = write_cache(tmp_path / "other", runs / "teacher", runs / "rollouts", temperature=0.5)
    shutil.rmtree(tmp_path / "cache")
    shutil.move(other, tmp_path / "cache")
    assert main(["report", str(tmp_path / "one"), "--answers", "0"]) == 0
    assert "was trained on another cache" in capsys.readouterr().err


def test_charts_of_few_or_equal_values():
    assert line_chart([("a", [])]) == histogram([], "tokens") == "<p>no values</p>"
    assert "nan" not in line_chart([("a", [(0, 1.0), (1, float("nan")), (2, 1.0)])])
    assert 'class="dot s0"' in line_chart([("a", [(5, 0.0)])])
    assert histogram([7, 7, 7], "tokens").count("<rect") == 24
    long = line_chart([("a", [(i, float(i)) for i in range(100_000)])])
    assert long.count("<circle") <= 601 and "at step 99999" in long


def test_many_tokens_make_a_page_of_bounded_size(runs):
    run = read_run(str(runs / "one"))
    text = render([run], [], [answer_of(25_000) for _ in range(4)], [None], [None])
    assert text.count("<tr>") < 200 and len(text) < 60e6


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.thorough
def test_a_browser_shows_the_tokens(runs, tmp_path):
    run = read_run(str(runs / "one"))
    page = tmp_path / "page.html"
    hostile = answer_of(50, lambda i: HOSTILE if i % 2 else f"word{i} ")
    page.write_text(
        render([run], [], [hostile, answer_of(20_000)], [None], [None]), encoding="utf-8"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    for width in (1280, 390):
        shot = tmp_path / f"report-{width}.png"
        flags = [f"--window-size={width},900", f"--screenshot={shot}", page.as_uri()]
        subprocess.run([*command, *flags], check=True, capture_output=True)
        assert shot.stat().st_size > 10_000
    long = tmp_path / "long.html"
    long.write_text(render([run], [], [answer_of(100_000)], [None], [None]), encoding="utf-8")
    argv = [*command, "--dump-dom", long.as_uri()]
    text = subprocess.run(argv, check=True, capture_output=True).stdout.decode()
    assert text.count('class="token') == 4000 and "tokens 0 to 3999 of 100000" in text
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], check=True, capture_output=True)
    text = dom.stdout.decode()
    assert text.count('class="token') == 50 and "alert(1)&lt;/script&gt;" in text
