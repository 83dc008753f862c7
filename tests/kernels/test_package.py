"""The package as a whole: imports, docstrings, and the examples in them."""

import doctest
import inspect
import subprocess
import sys

import pytest
import torch

import lopd_kernels
from lopd_kernels import divergence, logprobs, modules, policy, reference, workspace

MODULES = [divergence, logprobs, modules, policy, reference, workspace]
FUNCTIONS = [getattr(lopd_kernels, name) for name in lopd_kernels.__all__ if name.islower()] + [
    workspace.workspace_needed
]


def test_importing_the_library_imports_no_other():
    code = (
        "import sys, lopd_kernels; "
        "print(sorted({'transformers', 'triton', 'lopd'} & {m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_has_a_docstring():
    for name in lopd_kernels.__all__:
        assert getattr(lopd_kernels, name).__doc__


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_the_docstring_of_a_public_function_is_complete(function):
    for section in ("Args:", "Returns:", "Raises:", ">>> "):
        assert section in inspect.getdoc(function)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_examples_run(module):
    torch.manual_seed(0)
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert failed == 0 and attempted > 0
