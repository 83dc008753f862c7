"""The project's own files: metadata, make targets and the workflow of the hosted CI agree."""

import re
import sys
from pathlib import Path

import pytest
import yaml

import lopd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
JOBS = WORKFLOW["jobs"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".ci/run"]
PAGES += [ROOT / ".github/workflows/ci.yml", ROOT / ".github/pull_request_template.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def targets_named(text):
    return set(re.findall(r"(?:`|^|run: |\n)make ([a-z.][\w./-]*)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(READY)", ".venv/.ready")
    for target in targets_named(page.read_text(encoding="utf-8")):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_make_targets_are_found_where_pages_name_them():
    assert targets_named("Run `make lint`.\nmake test\n- run: make test-all") == {
        "lint",
        "test",
        "test-all",
    }
    assert targets_named((ROOT / "README.md").read_text(encoding="utf-8")) >= {"demo", "test"}


def test_the_workflow_tests_every_python_that_the_metadata_names():
    tested = {JOBS["checks"]["steps"][1]["with"]["python-version"]}
    tested |= set(JOBS["python"]["strategy"]["matrix"]["python"])
    prefix = "Programming Language :: Python :: "
    named = {c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)}
    assert tested == named
    lowest, highest = (int(v) for v in re.findall(r"3\.(\d+)", PROJECT["requires-python"]))
    assert named == {f"3.{minor}" for minor in range(lowest, highest)}


def test_the_workflow_tests_the_oldest_transformers_that_is_admitted():
    oldest, newest = JOBS["transformers"]["strategy"]["matrix"]["include"]
    required = PROJECT["optional-dependencies"]["train"]
    for package in ("transformers", "accelerate"):
        (lowest,) = (
            re.match(rf"{package}>=([\d.]+)", r)[1] for r in required if r.startswith(package)
        )
        assert f"{package}=={lowest}.*" in oldest["packages"]
        assert package in newest["packages"]


def test_the_guide_names_every_extra_that_users_install():
    guide = (ROOT / "docs/pipeline.md").read_text(encoding="utf-8")
    named = set(re.findall(r'`pip install "\.\[([\w-]+)\]"`', guide))
    assert named == set(PROJECT["optional-dependencies"]) - {"docs", "test"}


def test_the_version_stands_in_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lopd.__version__"}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(lopd.__version__)}\] - ", changelog, re.MULTILINE)


def test_pre_commit_checks_with_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints/cpu.txt").read_text(), re.MULTILINE)
    (rev,) = (repo["rev"] for repo in hooks["repos"] if "ruff" in repo["repo"])
    assert rev == f"v{pinned[1]}"
