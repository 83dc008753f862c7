"""The direction of dependency, and imports without side effects."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A package (or module) of lopd imports only from those before it in this list, and from itself.
PACKAGES = [
    "errors",
    "config",
    "provenance",
    "models",
    "store",
    "data",
    "engines",
    "training",
    "evaluation",
    "stages",
    "integrations",
    "cli",
]
USES_KERNELS = {"models", "engines", "training"}
# Modules of a package in this list stand in several layers; a package alone is one layer.
KERNEL_LAYERS = [
    {"_core.crew"},
    {
        "_core.gemm",
        "_core.listed_ids",
        "_core.types",
        "_core.waves",
        "_triton.kernels",
        "reference",
    },
    {"_core.rules"},
    {"_core.workspace", "_core.backend", "_core.buckets", "_checks", "_values"},
    {"_core.linear", "_core.skipping", "_torch", "_triton"},
    {"_core.scaling", "_core.listed"},
    {"_core.chunks", "_core.panels"},
    {"_core.kept_rows", "_core.logprobs", "_core.topk", "_core.dense_logits"},
    {"_ops"},
    {"_calls", "workspace"},
    {"divergence", "policy", "logprobs"},
    {"modules"},
    {"__init__"},
]
LEVEL = {name: level for level, name in enumerate(PACKAGES)}
KERNEL_LEVEL = {name: level for level, names in enumerate(KERNEL_LAYERS) for name in names}
MODULES = sorted((ROOT / "lopd").rglob("*.py"))


def top(path: Path) -> str:
    return path.relative_to(ROOT / "lopd").parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Dotted names of every absolute import in a file, wherever it stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_in_one_direction(path):
    package = top(path)
    for name in imported(path):
        parts = name.split(".")
        if package != "__init__" and parts[0] == "lopd" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[package], f"{package} imports {name}"
        if parts[0] == "lopd_kernels":
            assert package in USES_KERNELS, f"{package} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "lopd/config").glob("*.py")), ids=lambda p: p.name)
def test_settings_import_only_the_standard_library_at_their_top(path):
    """So that `--help` and errors in arguments wait for neither torch nor transformers."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert {name.split(".")[0] for name in found} <= {*sys.stdlib_module_names, "lopd"}


def test_every_package_has_its_place():
    assert {top(path) for path in MODULES} - {"__init__"} == set(LEVEL)


def test_modules_do_not_import_each_other_in_a_circle():
    """Wherever the imports stand, those inside functions included."""
    names = {dotted(path): path for path in MODULES}
    graph = {
        name: {other for other in imported(path) if other in names} - {name}
        for name, path in names.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError


KERNEL_MODULES = sorted(
    path.relative_to(ROOT / "lopd_kernels") for path in (ROOT / "lopd_kernels").rglob("*.py")
)


def kernel_layer(dotted: str) -> str:
    """The entry of KERNEL_LAYERS that a module below lopd_kernels belongs to."""
    parts = dotted.split(".")
    two = ".".join(parts[:2])
    return two if two in KERNEL_LEVEL else parts[0]


@pytest.mark.parametrize("path", KERNEL_MODULES, ids=str)
def test_the_kernels_stand_alone_and_point_one_way(path):
    layer = kernel_layer(".".join(path.with_suffix("").parts))
    for name in imported(ROOT / "lopd_kernels" / path):
        first, *rest = name.split(".")
        assert first not in {"lopd", "transformers", "accelerate"}
        if first == "triton":
            assert path.parts[0] == "_triton"
        other = kernel_layer(".".join(rest)) if first == "lopd_kernels" and rest else layer
        if other != layer and other in KERNEL_LEVEL:
            assert KERNEL_LEVEL[other] < KERNEL_LEVEL[layer], f"{layer} imports {name}"


def test_every_module_of_the_kernels_has_its_layer():
    modules = {".".join(path.with_suffix("").parts) for path in KERNEL_MODULES}
    packages = {name for name in modules if name.endswith("__init__") and "." in name}
    assert {kernel_layer(name) for name in modules - packages} == set(KERNEL_LEVEL)


def test_importing_is_inert():
    code = (
        "import sys, logging, torch\n"
        "before = (torch.get_num_threads(), torch.is_grad_enabled(), len(logging.root.handlers))\n"
        "import lopd, lopd.cli, lopd_kernels\n"
        "after = (torch.get_num_threads(), torch.is_grad_enabled(), len(logging.root.handlers))\n"
        "assert before == after, (before, after)\n"
        "assert not {'transformers', 'triton', 'matplotlib', 'vllm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_two_test_files_have_the_same_name():
    """pytest imports them by their names, without their folders."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
