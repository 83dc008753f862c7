"""Mistakes of operators: each is caught, in one line, with a remedy and the right exit code."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torture import harness
from torture.pipeline import COMMON, Pipeline, clear
from torture.table import Table

REMEDY = re.compile(
    r"; |did you mean|expected|requires|\buse |\bchoose |rerun|run .* again|pip install|missing --"
)


@dataclass(frozen=True)
class Mistake:
    """What somebody does, and what the error must say."""

    name: str
    argv: Callable[[Path], list[object]]  # of the pipeline's root; `out` is root / "attacked"
    says: str  # regular expression
    code: int = 2


def _stage(name: str, *more: object) -> Callable[[Path], list[object]]:
    """A command of the pipeline with flags added or, where they are there, replaced."""

    def argv(root: Path) -> list[object]:
        words = list(_PIPELINES[root].stages[name].argv(root / "attacked"))
        for flag, value in zip(more[::2], more[1::2], strict=True):
            value = root / value[1:] if isinstance(value, str) and value[:1] == "@" else value
            if flag in words:
                words[words.index(flag) + 1] = value
            else:
                words += [flag, value]
        return words

    return argv


def _words(*words: object) -> Callable[[Path], list[object]]:
    return lambda root: [
        root / word[1:] if isinstance(word, str) and word[:1] == "@" else word for word in words
    ]


def _after(prepare: Callable[[Path], None], argv: Callable[[Path], list[object]]):
    def both(root: Path) -> list[object]:
        prepare(root)
        return argv(root)

    return both


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def _copy(source: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    """A copy of an artefact as @copy, changed."""

    def prepare(root: Path) -> None:
        clear(root / "copy")
        shutil.copytree(root / source, root / "copy")
        change(root / "copy")

    return prepare


def _adopt(name: str, other: str) -> Callable[[Path], object]:
    return lambda copy: shutil.copy(copy.parent / other / name, copy / name)


def _edit_manifest(**changes: object) -> Callable[[Path], object]:
    def change(copy: Path) -> None:
        file = copy / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


_PIPELINES: dict[Path, Pipeline] = {}
_OUT = ("--out", "@attacked")

MISTAKES = [
    Mistake("unknown command", _words("rolout"), "did you mean 'rollout'"),
    Mistake("unknown flag", _stage("score", "--tpo-p", 1), "did you mean '--top-p'"),
    Mistake("required flag left out", _words("rollout", *_OUT), "missing --prompts"),
    Mistake("number out of range", _stage("score", "--top-p", 2), "top_p: .*0, 1"),
    Mistake("NaN for a number", _stage("score", "--top-p", "nan"), "top_p"),
    Mistake("text for a number", _stage("score", "--k", "many"), "k: .*many"),
    Mistake("no steps", _stage("sft", "--max-steps", 0), "max_steps"),
    Mistake("worker that does not exist", _stage("rollout", "--worker", "3/3"), "i from 0 to n"),
    Mistake("device that is not there", _stage("score", "--device", "cuda:9"), "cuda"),
    Mistake("settings file that is not there", _words("score", "--config", "@no.yaml"), "no.yaml"),
    Mistake(
        "unknown setting in a file",
        _after(_write("x.yaml", "teachr: t\n"), _words("score", "--config", "@x.yaml")),
        "did you mean 'teacher'",
    ),
    Mistake(
        "recipe without stages",
        _after(_write("x.yaml", "out: x\nteacher: t\nstudent: s\n"), _words("run", "@x.yaml")),
        "'stages' is missing",
    ),
    Mistake("model folder that is not there", _stage("rollout", "--student", "@none"), "none"),
    Mistake("folder of data as a model", _stage("score", "--teacher", "@rollout"), "config.json"),
    Mistake("prompts that are not there", _stage("rollout", "--prompts", "@none.jsonl"), "none"),
    Mistake(
        "empty prompts",
        _after(_write("x.jsonl", ""), _stage("rollout", "--prompts", "@x.jsonl")),
        "x.jsonl",
    ),
    Mistake(
        "prompts that are not JSON",
        _after(_write("x.jsonl", "hello\n"), _stage("rollout", "--prompts", "@x.jsonl")),
        "x.jsonl.*1",
    ),
    Mistake(
        "prompts under another key",
        _after(_write("x.jsonl", '{"q": "a"}\n'), _stage("rollout", "--prompts", "@x.jsonl")),
        "prompt",
    ),
    Mistake(
        "evaluation without answers",
        _after(_write("x.jsonl", '{"prompt": "a b"}\n'), _stage("eval", "--prompts", "@x.jsonl")),
        "'answer'",
    ),
    Mistake("regex without a group", _stage("eval", "--answer-regex", "[0-9]+"), "one"),
    Mistake("answers beyond the context", _stage("rollout", "--max-new-tokens", 4096), "context"),
    Mistake("more list entries than tokens", _stage("score", "--k", 10**6), "k"),
    Mistake(
        "the wrong folder: a cache as rollouts", _stage("score", "--rollouts", "@score"), "'cache'"
    ),
    Mistake(
        "the wrong folder: rollouts as a cache",
        _stage("distill", "--cache", "@rollout"),
        "'rollouts'",
    ),
    Mistake(
        "the wrong folder: rollouts as answers", _stage("sft", "--data", "@rollout"), "'rollouts'"
    ),
    Mistake(
        "training into a folder of rollouts", _stage("sft", "--out", "@rollout"), "holds 'rollouts'"
    ),
    Mistake(
        "rollouts into a folder of a model",
        _stage("rollout", "--out", "@sft"),
        "holds 'checkpoint'",
    ),
    Mistake(
        "another setting for a finished cache",
        _stage("score", "--out", "@score", "--k", 5),
        "k was 6, is 5",
    ),
    Mistake(
        "advantages without rewards",
        _stage("distill", "--token-weights", "advantage"),
        "reads the reward of each answer",
    ),
    Mistake(
        "a divergence on calibrated log-probs",
        _stage("distill", "--cache", "@calibrate"),
        "its log-probs are calibrated",
    ),
    Mistake(
        "a folder with other files",
        _after(lambda root: _other_files(root), _stage("rollout")),
        "holds notes.txt",
    ),
    Mistake(
        "a file in the place of the folder",
        _after(_write("file", "x"), _stage("rollout", "--out", "@file")),
        "is a file",
    ),
    Mistake(
        "manifest deleted",
        _after(
            _copy("rollout", lambda f: (f / "manifest.json").unlink()),
            _stage("score", "--rollouts", "@copy"),
        ),
        "has no manifest.json",
    ),
    Mistake(
        "manifest of another run copied in",
        _after(
            _copy("score", _adopt("manifest.json", "score-compact")),
            _stage("distill", "--cache", "@copy"),
        ),
        "of another run",
    ),
    Mistake(
        "manifest edited",
        _after(
            _copy("score", _edit_manifest(temperature=2.0)), _stage("distill", "--cache", "@copy")
        ),
        "of another run",
    ),
    Mistake(
        "receipt of another run copied in",
        _after(
            _copy("score", _adopt("shard-00001.json", "score-compact")),
            _stage("distill", "--cache", "@copy"),
        ),
        "shard-00001.json.*of another run",
    ),
    Mistake(
        "shard of another run copied in",
        _after(
            _copy("score", _adopt("shard-00001.safetensors", "score-compact")),
            _stage("distill", "--cache", "@copy"),
        ),
        "shard-00001.safetensors",
    ),
    Mistake(
        "shard deleted",
        _after(
            _copy("rollout", lambda f: (f / "shard-00002.safetensors").unlink()),
            _stage("score", "--rollouts", "@copy"),
        ),
        "shard is missing",
    ),
    Mistake(
        "unfinished cache trained on",
        _after(
            _copy("score", lambda f: (f / "shard-00003.json").unlink()),
            _stage("distill", "--cache", "@copy"),
        ),
        "receipt is missing|unfinished",
    ),
    Mistake(
        "another student than the one that sampled",
        _stage("distill", "--student", "@student"),
        "a student \\(.*not recorded",
    ),
    Mistake("teacher that is not there", _stage("score", "--teacher", "@nowhere"), "nowhere"),
    Mistake("everything held out", _stage("distill", "--holdout", 1000), "hold"),
    Mistake("refresh without a teacher", _stage("distill", "--refresh-every", 2), "teacher"),
    Mistake(
        "scores in the wrong format",
        _stage("import", "--format", "lightning-opd"),
        "lightning|metadata|expected",
    ),
    Mistake(
        "scores without fields",
        _after(_write("x.jsonl", "{}\n"), _stage("import", "--source", "@x.jsonl")),
        "x.jsonl",
    ),
    Mistake(
        "inspecting a folder of something else",
        _after(
            _copy("student", lambda copy: (copy / "config.json").unlink()),
            _words("inspect", "--path", "@copy"),
        ),
        "manifest.json",
    ),
    Mistake(
        "rescoring what has no scores",
        _words(
            "verify",
            "--path",
            "@rollout",
            "--rescore",
            4,
            "--teacher",
            "@teacher",
            "--student",
            "@sft",
            *COMMON,
        ),
        "requires a cache",
    ),
    Mistake(
        "template with a syntax error",
        _after(
            _write("bad.jinja", "{{ prompt }"), _stage("score", "--teacher-template", "@bad.jinja")
        ),
        r"bad\.jinja:1: ",
    ),
    Mistake(
        "template of a field that no record has",
        _after(
            _write("more.jinja", "{{ prompt }} {{ nothing }}"),
            _stage("score", "--teacher-template", "@more.jinja"),
        ),
        r"jsonl:1: .*'nothing' is undefined",
    ),
    Mistake(
        "memory without a unit",
        _words("plan", "--model", "@student", "--gpu-memory", "lots"),
        "gpu_memory",
    ),
]


def _other_files(root: Path) -> None:
    (root / "attacked").mkdir()
    (root / "attacked" / "notes.txt").write_text("mine")


def make_all(pipeline: Pipeline, table: Table) -> list[tuple[str, str, int, str]]:
    """Make every mistake once; returns (mistake, remedy in the error, exit code, error)."""
    _PIPELINES[pipeline.root] = pipeline
    rows = []
    before = {name: _stamp(stage.out) for name, stage in pipeline.stages.items()}
    for mistake in MISTAKES:
        clear(pipeline.root / "attacked")
        end = harness.run(mistake.argv(pipeline.root))
        problem = ""
        if end.has_traceback:
            problem = "traceback: " + end.text.strip().splitlines()[-1]
        elif end.code != mistake.code:
            problem = f"exit {end.code}: {end.error}"
        elif not re.search(mistake.says, end.error):
            problem = f"says something else: {end.error}"
        elif not REMEDY.search(end.error):
            problem = f"has no remedy: {end.error}"
        elif any(_stamp(pipeline.stages[name].out) != before[name] for name in before):
            problem = "changed an artefact that was there"
        table.add("mistake of an operator", mistake.name, problem)
        rows.append((mistake.name, end.error, end.code, problem))
    return rows


def _stamp(folder: Path) -> dict[str, int]:
    names = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith("lock"))
    return {str(path): path.stat().st_mtime_ns for path in names}


def shortened(error: str) -> str:
    """The words of an error for a table: without the command, folders and digests."""
    words = re.sub(r"(?<!\w)/([^ :;,/]*/)+", "", error.split("error: ", 1)[-1])
    return re.sub(r"\b[0-9a-f]{12,64}\b", "...", words.replace("|", "\\|"))


def markdown(rows: list[tuple[str, str, int, str]]) -> str:
    """What was done, what the error says, and the exit code."""
    lines = ["| mistake | error | exit code |", "| --- | --- | ---: |"]
    for name, error, code, _ in rows:
        lines.append(f"| {name} | {shortened(error)} | {code} |")
    return "\n".join(lines)
