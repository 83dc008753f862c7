"""The kernel of the Hugging Face Hub: assembled from the package, and loaded beside it."""

import ast
import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / ".hub-kernels"  # `make .hub-kernels/.ready` installs `kernels` there
# A build is loaded under its own name, without the package; both variants in one process.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
sys.modules["lopd_kernels"] = None  # an absolute import would fail
def load(path):
    name = json.loads((path / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
builds = [load(Path(sys.argv[1]) / "build" / name) for name in ("torch-cpu", "torch-cuda")]
"""
USE = """
import importlib, torch
torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
logprobs, ids = torch.log_softmax(torch.randn(6, 40), -1).topk(4)
for build in builds:
    reference = importlib.import_module(f"{build.__name__}.reference")
    losses = {
        "linear_sparse_divergence": (ids, logprobs),
        "linear_policy_gradient": (ids[:, 0], logprobs[:, 0]),
        "linear_cross_entropy": (ids[:, 0],),
    }
    for name, given in losses.items():
        loss, dense = (getattr(of, name)(hidden, weight, *given) for of in (build, reference))
        torch.testing.assert_close(loss, dense)
        gradients = [torch.autograd.grad(each, (hidden, weight)) for each in (loss, dense)]
        for found, expected in zip(*gradients):
            torch.testing.assert_close(found, expected)
    build.sparse_divergence(hidden @ weight.T, ids, logprobs).backward()
    build.LinearSparseDivergence()(hidden, weight, ids, logprobs).backward()
    assert build.linear_topk(hidden, weight, 3).ids.shape == (6, 3)
    build.linear_logprobs(hidden, weight, ids).sum().backward()
    assert f"{build.__name__}::fused_loss" in torch._C._dispatch_get_all_op_names()
assert builds[0].__name__ != builds[1].__name__
assert "lopd::fused_loss" not in torch._C._dispatch_get_all_op_names()
parts = ("_torch", "_triton")
print([part for part in parts if f"{builds[1].__name__}.{part}.rows" in sys.modules])
"""


@pytest.fixture(scope="module")
def assemble():
    spec = importlib.util.spec_from_file_location("assemble", ROOT / "hub/assemble.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kernel(assemble, tmp_path_factory):
    return assemble.assemble(tmp_path_factory.mktemp("hub") / "kernel")


def run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_package_imports_itself_relatively(kernel):
    """Every module is there, and imports nothing but itself, the standard library and torch."""
    modules = {
        path.relative_to(ROOT / "lopd_kernels") for path in (ROOT / "lopd_kernels").rglob("*.py")
    }
    modules = {Path(str(path).replace("_ops/", "_operators/")) for path in modules}
    for folder in (kernel / "torch-ext/lopd_kernels", *(kernel / "build").iterdir()):
        extra = set() if "torch-ext" in folder.parts else {Path("_ops.py")}
        assert {path.relative_to(folder) for path in folder.rglob("*.py")} == modules | extra
        for path in folder.rglob("*.py"):
            names = set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names.add(node.module)
            tops = {name.split(".")[0] for name in names}
            assert tops <= {*sys.stdlib_module_names, "torch", "triton"}, path


def test_a_build_is_the_source_with_the_name_of_its_operators(kernel):
    """As kernel-builder makes it of the same source, whose file _ops.py has another name in it."""
    source = kernel / "torch-ext/lopd_kernels"
    for variant in (kernel / "build").iterdir():
        for path in source.rglob("*.py"):
            assert (variant / path.relative_to(source)).read_bytes() == path.read_bytes()
        name = json.loads((variant / "metadata.json").read_text())["id"]
        assert f'"{name}"' in (variant / "_ops.py").read_text()


def test_the_imports_are_rewritten_as_the_examples_say(assemble):
    failed, attempted = doctest.testmod(assemble)
    assert failed == 0 and attempted == 2


@pytest.mark.thorough
@pytest.mark.parametrize(("interpreted", "part"), [("0", "_torch"), ("1", "_triton")])
def test_two_builds_run_in_one_process_without_the_package(kernel, interpreted, part):
    found = run(LOAD + USE, kernel, TRITON_INTERPRET=interpreted)
    assert found == str([part])


def test_a_build_is_named_by_its_content(assemble, kernel):
    modules = assemble.files()
    first, again = (json.loads(assemble.variant(modules, "cpu")["metadata.json"]) for _ in range(2))
    modules["policy.py"] += "# changed"
    other = json.loads(assemble.variant(modules, "cpu")["metadata.json"])
    assert first == again == json.loads((kernel / "build/torch-cpu/metadata.json").read_text())
    assert other["id"] != first["id"] and first["id"].isidentifier()


def test_only_an_earlier_kernel_is_replaced(assemble, kernel, tmp_path):
    assemble.assemble(kernel)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not a kernel"):
        assemble.assemble(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.thorough
def test_the_library_kernels_loads_it(kernel):
    """Through its own loader and its own checks of build.toml and hashes, as the card shows."""
    if not (LIBRARY / ".ready").exists():
        pytest.skip("kernels is not in .hub-kernels; run `make .hub-kernels/.ready`")
    card = (kernel / "README.md").read_text(encoding="utf-8")
    example = card.split("```python\n")[1].split("```")[0]
    call = 'get_kernel("OWNER/lopd-kernels", version=0, trust_remote_code=True)'
    assert call in example
    example = example.replace("import get_kernel", "import get_local_kernel")
    example = example.replace(call, 'get_local_kernel(Path(sys.argv[1]), backend="cpu")')
    hashes = """
from kernels._rust import Backend, Build, Digest, DigestAlgorithm, Metadata
assert Build.open(sys.argv[1]).general.backends == [Backend.CPU, Backend.CUDA]
for variant in (Path(sys.argv[1]) / "build").iterdir():
    digest = Metadata.read_from_file(variant / "metadata.json").digest
    digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
print(lopd_kernels.__name__)
"""
    head = "import sys\nfrom pathlib import Path\n"
    found = run(head + example + hashes, kernel, PYTHONPATH=str(LIBRARY))
    assert found.startswith("_lopd_kernels_cpu_")
