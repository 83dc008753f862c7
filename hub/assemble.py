"""Assemble `lopd_kernels` as a kernel of the Hugging Face Hub: `make hub-kernel`.

The library `kernels` loads a folder under a unique name beside other builds of the same kernel. So
in the copies the package imports itself relatively, and its operators have a namespace of their
own. Each backend is a variant: `build/torch-cpu` runs in torch, `build/torch-cuda` in Triton.
"""

import argparse
import ast
import base64
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "lopd_kernels"
NAME = "lopd-kernels"
VERSION = 0  # the Hub's number for an API that may still change
# Of `kernels`: the version that the tests load a build with.
OLDEST_KERNELS = "0.17.2"
BACKENDS = {
    "cpu": {"type": "cpu"},
    "cuda": {"type": "cuda", "archs": ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]},
}
NAMESPACE = 'NAMESPACE = "lopd"'


def relative(source: str, path: Path) -> str:
    """A module's source with relative imports from its own package.

    Args:
        path: of the module, below the package.

    >>> relative("from lopd_kernels._core.rules import Rule", Path("_ops/losses.py"))
    'from .._core.rules import Rule'
    >>> relative("from lopd_kernels import _checks", Path("policy.py"))
    'from . import _checks'
    """
    lines, dots = source.split("\n"), "." * len(path.parts)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith(SOURCE.name) for alias in node.names), path
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == SOURCE.name:
            line = lines[node.lineno - 1]
            new = f"from {dots}{(node.module or '').removeprefix(SOURCE.name).removeprefix('.')}"
            lines[node.lineno - 1] = line.replace(f"from {node.module}", new, 1)
            assert lines[node.lineno - 1] != line, f"{path}:{node.lineno}"
    return "\n".join(lines)


def files() -> dict[str, str]:
    """The modules of the package with relative imports, by their path."""
    paths = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
    return {
        path.as_posix(): relative((SOURCE / path).read_text(encoding="utf-8"), path)
        for path in paths
    }


def variant(modules: dict[str, str], backend: str) -> dict[str, str]:
    """The files of one variant, its metadata included."""
    content = hashlib.sha256(json.dumps(modules).encode()).hexdigest()
    unique = f"_{SOURCE.name}_{backend}_{content[:10]}"
    schema = modules["_ops/schema.py"]
    assert schema.count(NAMESPACE) == 1
    built = {**modules, "_ops/schema.py": schema.replace(NAMESPACE, f'NAMESPACE = "{unique}"')}
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in built.items()}
    metadata = {
        "name": NAME,
        "id": unique,
        "version": VERSION,
        "kernels-minver": OLDEST_KERNELS,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": BACKENDS[backend],
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(value).decode() for name, value in digests.items()},
        },
    }
    return {**built, "metadata.json": json.dumps(metadata, indent=2) + "\n"}


def assemble(out: Path) -> Path:
    """Write the kernel's folder, in place of an earlier one."""
    modules = files()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        made = Path(folder) / "kernel"
        for backend in BACKENDS:
            for name, text in variant(modules, backend).items():
                path = made / "build" / f"torch-{backend}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        shutil.copy(Path(__file__).with_name("card.md"), made / "README.md")
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
