"""Show what this machine has, what is missing, and what that costs (`lopd doctor`)."""

import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lopd.config.doctor import DoctorConfig

# package: (what does not work without it, how to install it); None: nothing works. The extras of
# lopd name the versions that it works with; with lopd installed, pip looks for no other lopd.
PACKAGES: dict[str, tuple[str | None, str]] = {
    "lopd": (None, "pip install lopd"),
    "torch": (None, "pip install torch"),
    "safetensors": (None, "pip install safetensors"),
    "transformers": ("no command of the pipeline", 'pip install "lopd[train]"'),
    "accelerate": ("no training", 'pip install "lopd[train]"'),
    "triton": ("no fused kernels: losses on a GPU run in torch", "pip install triton"),
    "vllm": (
        "no --engine vllm: answers are sampled more slowly",
        'in an environment of its own: pip install ".[vllm]"',
    ),
    "flash-attn": ("no flash attention 2: packs use another kind", "pip install flash-attn"),
    "peft": ("no --lora-rank", 'pip install "lopd[peft]"'),
    "pyarrow": ("no parquet files", 'pip install "lopd[parquet]"'),
    "trl": ("no lopd.integrations.trl", 'pip install "lopd[trl]"'),
    "datasets": ("no lopd.integrations.datasets", 'pip install "lopd[datasets]"'),
    "ray": ("no lopd.integrations.ray", 'pip install "lopd[ray]"'),
    "math-verify": ("no --judge math", 'pip install "lopd[eval]"'),
    "matplotlib": ("no figures", 'pip install "lopd[bench]"'),
}
FOR_A_GPU = ("triton", "flash-attn")  # of no use without one
FEWEST_OPEN_FILES = 4096
LEAST_FREE_DISK = 20 << 30
LEAST_SHARED_MEMORY = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        item: what was looked at.
        found: what is there.
        cost: what does not work; empty if all is well.
        remedy: the command or setting that mends it.
    """

    item: str
    found: str
    cost: str = ""
    remedy: str = ""


def main(config: DoctorConfig) -> None:
    """Print the findings, and below them what each missing thing costs and how to mend it."""
    gpus = [*devices()]
    has_gpu = any(finding.item.startswith("gpu ") for finding in gpus)
    findings = [*machine(), *gpus, *packages(has_gpu)]
    if config.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
        return
    width = max(len(finding.item) for finding in findings)
    for finding in findings:
        print(f"{finding.item:<{width}}  {finding.found}")
    for finding in findings:
        if finding.cost:
            print(f"\n{finding.item}: {finding.cost}")
            print(f"  {finding.remedy}")


def machine(folder: str = ".") -> Iterator[Finding]:
    """The operating system, memory, limits and disk."""
    yield Finding("python", f"{platform.python_version()} on {platform.system()} "
                            f"{platform.machine()}")  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cpu", f"{len(os.sched_getaffinity(0))} cores, {gib(memory)} memory")
    free = shutil.disk_usage(folder).free
    yield Finding(
        "disk",
        f"{gib(free)} free here",
        *few(free, LEAST_FREE_DISK, "checkpoints may not fit", "free space, or another --out"),
    )
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    yield Finding(
        "shared memory",
        gib(shared),
        *few(shared, LEAST_SHARED_MEMORY, "several processes may fail to exchange tensors",
             "docker run --shm-size=8g, or mount a larger /dev/shm"),
    )  # fmt: skip
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield Finding(
        "open files",
        f"at most {limit}",
        *few(limit, FEWEST_OPEN_FILES, "a cache of many shards may not open",
             f"ulimit -n {FEWEST_OPEN_FILES}"),
    )  # fmt: skip
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    yield Finding("hub", f"{'offline' if offline else 'online'}, models are kept in {home}")


def few(value: int, enough: int, cost: str, remedy: str) -> tuple[str, str]:
    """(cost, remedy) if there is less than enough."""
    return (cost, remedy) if value < enough else ("", "")


def gib(size: int) -> str:
    """Bytes in GiB, in words."""
    return f"{size / 2**30:.1f} GiB"


def devices() -> Iterator[Finding]:
    """Each GPU that torch sees, and the driver."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA's is missing
        yield Finding("gpu", "unknown", f"torch cannot be imported: {error}", PACKAGES["torch"][1])
        return
    if not torch.cuda.is_available():
        yield no_gpu(torch.version.cuda or torch.version.hip)
        return
    yield Finding("driver", driver() or "unknown (no answer from nvidia-smi)")
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    yield Finding(
        "C compiler",
        compiler or "none",
        "" if compiler else "Triton cannot build its launchers: no fused kernels",
        "" if compiler else "apt-get install gcc, and the headers of Python (python3-dev)",
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        has_bf16 = properties.major >= 8 or bool(torch.version.hip)
        yield Finding(
            f"gpu {index}",
            f"{properties.name}, {gib(properties.total_memory)}, compute capability "
            f"{properties.major}.{properties.minor}",
            "" if has_bf16 else "it computes bfloat16 slowly",
            "" if has_bf16 else "--dtype float16, or float32",
        )


def no_gpu(built: str | None) -> Finding:
    """What it means that torch sees no GPU.

    Args:
        built: the version of CUDA or HIP that torch is built for, None for CPUs.
    """
    found = f"none (torch is built for {built})" if built else "none (torch is built for CPUs)"
    version = driver()
    if version is None:
        return Finding(
            "gpu",
            found,
            "everything runs on the CPU: enough for lopd demo and for tests",
            "use a machine with a GPU and its driver, and a torch that is built for it",
        )
    remedy = "install a torch that is built for that driver, see pytorch.org"
    if built:
        remedy = "see what python -c 'import torch; torch.cuda.init()' says; " + remedy
    return Finding("gpu", found, f"torch cannot use the GPU of driver {version}", remedy)


def driver() -> str | None:
    """The version of the GPU driver, as nvidia-smi states it; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def packages(has_gpu: bool) -> Iterator[Finding]:
    """The installed version of each package that lopd can use, and whether lopd works with it."""
    for name, (cost, remedy) in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name in FOR_A_GPU and not has_gpu:
                yield Finding(name, "not installed, and of use on a GPU only")
                continue
            where = f" in {sys.prefix}"
            yield Finding(name, "not installed", cost or f"lopd does not work{where}", remedy)
            continue
        if (wanted := unmet(name, version)) is None:
            yield Finding(name, version)
        else:
            yield Finding(name, version, f"lopd expects {wanted}", f"pip install '{name}{wanted}'")


def unmet(name: str, version: str) -> str | None:
    """The versions of a package that lopd works with, if this is none of them."""
    try:
        lines = importlib.metadata.requires("lopd") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for line in lines:
        requirement = Requirement(line)
        if (
            canonicalize_name(requirement.name) == name
            and requirement.specifier
            and (not requirement.specifier.contains(version, prereleases=True))
        ):
            return str(requirement.specifier)
    return None
