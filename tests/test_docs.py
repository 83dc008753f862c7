"""The documents: tables match the committed rows, examples run, names and links exist."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

import lopd_kernels
from benchmarks import readme
from lopd import cli
from lopd.cli.commands import COMMANDS
from lopd.config.strict_yaml import load_yaml
from lopd.stages import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/NOTES.md",
]
PAGES += ["recipes/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
GUIDE = "\n".join(text for name, text in TEXTS.items() if name not in ("CHANGELOG.md",))
# Commands as a shell reads them: a line that ends in a backslash goes on.
COMMAND_LINES = re.findall(
    r"^(?:[A-Z_]+=\S+ )?(?:torchrun .*? -m lopd\.cli|lopd) (.*)$",
    GUIDE.replace("\\\n", " "),
    re.MULTILINE,
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_match_the_committed_rows():
    assert readme.rendered(README) == README, "run python -m benchmarks.readme"


def test_the_library_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    loss, entropy = map(float, capsys.readouterr().out.split())
    assert loss > 0 and entropy > 0


NEED_A_PIPELINE = {  # page: where its examples run
    "docs/python.md": "tests/test_python_api.py",
    "docs/how-to/many-nodes.md": "tests/integrations/test_ray.py",
    "docs/how-to/trl.md": "tests/integrations/test_trl_trainer.py",
}
BLOCKS = [
    (name, n, block)
    for name, text in TEXTS.items()
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    if name not in NEED_A_PIPELINE
]


@pytest.mark.parametrize(("name", "n", "block"), BLOCKS, ids=lambda part: str(part)[:20])
def test_examples_in_python_run(name, n, block):
    exec(compile(block, f"{name}, block {n}", "exec"), {})


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:linear|sparse)_\w+)`", GUIDE))))
def test_functions_in_the_documents_exist(name):
    assert callable(getattr(lopd_kernels, name))


@pytest.mark.parametrize("line", sorted({" ".join(line.split()) for line in COMMAND_LINES}))
def test_commands_in_the_documents_parse(line, monkeypatch):
    command, *flags = shlex.split(line, comments=True)
    seen = []
    monkeypatch.setattr(cli, "_stage", lambda name, quiet: SimpleNamespace(main=seen.append))
    assert cli.main([command, *flags]) == 0
    assert isinstance(seen[0], COMMANDS[command].config_class())


RECIPES = [
    (name, block)
    for name, text in TEXTS.items()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    if "\nstages:" in block
]


@pytest.mark.parametrize(("name", "block"), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes_in_the_documents_parse(name, block, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "local_models", lambda name: name)
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    assert "distill" in run.stage_configs(load_yaml(str(tmp_path / "recipe.yaml")), name)


@pytest.mark.parametrize("page", [name for name in PAGES if name != "CHANGELOG.md"])
def test_files_in_the_documents_exist(page):
    folders = "lopd|lopd_kernels|docs|benchmarks|tests|recipes"
    for name in re.findall(rf"`((?:{folders})/[\w./]+)`", TEXTS[page]):
        assert (ROOT / name).exists(), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_between_the_documents_lead_somewhere(page):
    for target in re.findall(r"\]\(([\w./-]+)\)", TEXTS[page]):
        file = (ROOT / page).parent / target
        if file != ROOT / "docs" / load("pages").COMMANDS_PAGE:  # which the site generates
            assert file.exists(), f"{page} links to {target}"


def is_there(name):
    """Whether a dotted name leads to a module, and the rest of it stands there."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:count])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if file.exists():
                text = file.read_text(encoding="utf-8")
                return all(re.search(rf"\b{part}\b", text) for part in parts[count:])
    return False


def test_dotted_names_in_documents_and_docstrings_exist():
    assert is_there("lopd.store.codec.CODECS") and not is_there("lopd.store.codec.CODEX")
    code = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for package in ("lopd", "lopd_kernels", "benchmarks", "tests")
        for path in (ROOT / package).rglob("*.py")
    }
    named = {
        (page, name)
        for page, text in (TEXTS | code).items()
        for name in re.findall(r"`((?:lopd|lopd_kernels|benchmarks)(?:\.\w+)+)`", text)
        if page != "CHANGELOG.md"  # which names what was
    }
    assert named and not [(page, name) for page, name in named if not is_there(name)]


def anchors(text):
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def test_anchors_are_those_of_the_headings_outside_of_code():
    text = "# A title\n```sh\n# a comment\n```\n### `a_b`, and more: 2.\n"
    assert anchors(text) == {"a-title", "a_b-and-more-2"}


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_lead_to_one(page):
    for target, anchor in re.findall(r"\]\(((?:[\w./-]+\.md)?)#([\w-]+)\)", TEXTS[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page}: {target}#{anchor}"


def test_the_layout_page_lists_every_module_with_its_docstring():
    layout = load("layout")
    assert TEXTS["docs/layout.md"] == layout.page(), "run python docs/layout.py"
    listed = set(re.findall(r"^\| `((?:lopd|lopd_kernels)/[\w/]+\.py)` \| .", layout.page(), re.M))
    packages = (ROOT / "lopd", ROOT / "lopd_kernels")
    modules = {
        path.relative_to(ROOT).as_posix() for each in packages for path in each.rglob("*.py")
    }
    assert listed == modules


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_layout_page_is_linked(page):
    assert "(docs/layout.md)" in TEXTS[page]


def test_the_pictures_are_those_that_the_script_draws():
    for name, text in load("idea").pictures().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run python docs/idea.py"
