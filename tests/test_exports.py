"""The public names of `lopd`, which are imported on first use."""

import ast
import doctest
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints

import pytest

import lopd
from lopd.cli.commands import COMMANDS
from lopd.errors import LopdError


@pytest.mark.parametrize("name", sorted(lopd.__all__))
def test_public_names_exist_and_are_listed(name):
    assert getattr(lopd, name).__name__.removeprefix("lopd.") in (name, "main")
    assert name in dir(lopd)


def test_type_checkers_see_the_same_imports_as_the_interpreter():
    tree = ast.parse(Path(lopd.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    names = [(node.module, alias) for node in checked.body for alias in node.names]
    modules = {alias.name: module for module, alias in names if alias.asname is None}
    stages = {alias.asname: module for module, alias in names if alias.asname}
    assert modules == lopd._MODULES
    assert stages == {name: f"lopd.stages.{name}" for name in lopd._STAGES}
    assert {*modules, *stages, "errors"} == {*lopd.__all__}


def test_every_command_is_a_function_of_its_config():
    commands = {about.module: about.config_class() for about in COMMANDS.values()}
    assert sorted(commands) == lopd._STAGES
    for name, config in commands.items():
        assert getattr(lopd, config.__name__) is config
        assert get_type_hints(getattr(lopd, name))["config"] is config
        assert inspect.getdoc(getattr(lopd, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lopd' has no attribute 'train'"):
        lopd.train  # noqa: B018
    assert lopd.errors.LopdError is LopdError


def test_importing_the_package_loads_nothing_else():
    code = (
        "import sys, lopd\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lopd_kernels'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not {m for m in sys.modules if m.startswith('lopd.')} - {'lopd.errors'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "name", ["LopdTrainer", "Objective", "run_with_loss", "step", "train_loop"]
)
def test_the_docstring_of_a_public_name_is_complete(name):
    documentation = inspect.getdoc(getattr(lopd, name))
    for section in ("Args:", "Raises:", ">>> "):
        assert section in documentation
    assert inspect.isclass(getattr(lopd, name)) or "Returns:" in documentation


@pytest.mark.parametrize("module", sorted({*lopd._MODULES.values(), "lopd"}))
def test_the_examples_run(module):
    failed, _attempted = doctest.testmod(import_module(module))
    assert failed == 0
