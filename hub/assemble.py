"""Assemble `lopd_kernels` as a kernel of the Hugging Face Hub: `make hub-kernel`.

The folder is a project of Hugging Face's kernel-builder (`build.toml`, `torch-ext/lopd_kernels`)
with its builds: `build/torch-cpu` runs in torch, `build/torch-cuda` in Triton. The library
`kernels` loads a build under a unique name beside others of the same kernel. So in the copies the
package imports itself relatively, and its operators have the namespace of the build, which
`_ops.py` holds. kernel-builder writes that file into its own builds, so the package `_ops` is
called `_operators`.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "lopd_kernels"
NAME = "lopd-kernels"
VERSION = 0  # the Hub's number for an API that may still change
LICENSE = "apache-2.0"  # the Hub's identifier
# Of `kernels`: the version that the tests load a build with.
OLDEST_KERNELS = "0.17.2"
ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
BACKENDS = {"cpu": {"type": "cpu"}, "cuda": {"type": "cuda", "archs": ARCHS}}
NAMESPACE = 'NAMESPACE = "lopd"'
OF_THE_BUILD = (
    "from .._ops import add_op_namespace_prefix\n\n"
    'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")'
)
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = {json.dumps([*BACKENDS])}

[torch-noarch]
cuda_capabilities = {json.dumps(ARCHS)}
"""
FLAKE = """{
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
OPS = '''"""The namespace of this build's operators; kernel-builder writes a file of this name."""

import torch

_OPS_NAME = "{unique}"
ops = getattr(torch.ops, _OPS_NAME)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{_OPS_NAME}}::{{op_name}}"
'''


def renamed(text: str) -> str:
    """A path or a dotted name in the package, without the name that kernel-builder takes."""
    return re.sub(r"\b_ops\b", "_operators", text)


def relative(source: str, path: Path) -> str:
    """A module's source with relative imports from its own package.

    Args:
        path: of the module, below the package.

    >>> relative("from lopd_kernels._core.rules import Rule", Path("_ops/losses.py"))
    'from .._core.rules import Rule'
    >>> relative("from lopd_kernels._ops import losses as ops", Path("policy.py"))
    'from ._operators import losses as ops'
    """
    lines, dots = source.split("\n"), "." * len(path.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith(SOURCE.name) for alias in node.names), path
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == SOURCE.name:
            assert "_ops" not in [alias.name for alias in node.names], f"{path}:{node.lineno}"
            line = lines[node.lineno - 1]
            below = renamed((node.module or "").removeprefix(SOURCE.name).removeprefix("."))
            lines[node.lineno - 1] = line.replace(f"from {node.module}", f"from {dots}{below}", 1)
            assert lines[node.lineno - 1] != line, f"{path}:{node.lineno}"
    return "\n".join(lines)


def files() -> dict[str, str]:
    """The modules of the package as kernel-builder takes them, by their path."""
    modules = {}
    for path in sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")):
        source = relative((SOURCE / path).read_text(encoding="utf-8"), path)
        modules[renamed(path.as_posix())] = source
    schema = modules["_operators/schema.py"]
    assert schema.count(NAMESPACE) == 1
    modules["_operators/schema.py"] = schema.replace(NAMESPACE, OF_THE_BUILD)
    return modules


def variant(modules: dict[str, str], backend: str) -> dict[str, str]:
    """The files of one build, its metadata included."""
    content = hashlib.sha256(json.dumps(modules).encode()).hexdigest()
    unique = f"_{SOURCE.name}_{backend}_{content[:10]}"
    built = {**modules, "_ops.py": OPS.format(unique=unique)}
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in built.items()}
    metadata = {
        "name": NAME,
        "id": unique,
        "version": VERSION,
        "kernels-minver": OLDEST_KERNELS,
        "license": LICENSE,
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(value).decode() for name, value in digests.items()},
        },
    }
    return {**built, "metadata.json": json.dumps(metadata, indent=2) + "\n"}


def write(folder: Path, contents: dict[str, str]) -> None:
    """Write files into a folder, by their path below it."""
    for name, text in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def assemble(out: Path) -> Path:
    """Write the kernel's folder, in place of an earlier one."""
    modules = files()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / "kernel"
        write(made / "torch-ext" / SOURCE.name, modules)
        for backend in BACKENDS:
            write(made / "build" / f"torch-{backend}", variant(modules, backend))
        write(made, {"build.toml": BUILD, "flake.nix": FLAKE})
        for name in ("README.md", "CARD.md"):  # kernel-builder makes the first of the second
            shutil.copy(Path(__file__).with_name("card.md"), made / name)
        shutil.copy(ROOT / "LICENSE", made / "LICENSE")
        if out.exists():
            if not (out / "build/torch-cpu/metadata.json").exists():
                raise SystemExit(f"{out}: is not a kernel that this script wrote; name another")
            shutil.rmtree(out)
        made.rename(out)
    return out


def main() -> None:
    """Assemble the kernel and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/hub-kernel")
    print(assemble(parser.parse_args().out))


if __name__ == "__main__":
    main()
