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

from lopd.config.doctor import DoctorConfig

# package: (what does not work without it, how to install it); None: nothing works.
PACKAGES: dict[str, tuple[str | None, str]] = {
    "lopd": (None, "pip install lopd"),
    "torch": (None, "pip install torch"),
    "safetensors": (None, "pip install safetensors"),
    "transformers": ("no command of the pipeline", 'pip install "lopd[train]"'),
    "accelerate": ("no training", 'pip install "lopd[train]"'),
    "triton": ("no fused kernels: losses on a GPU run in torch", "pip install triton"),
    "vllm": ("no --engine vllm: answers are sampled more slowly", 'pip install "lopd[vllm]"'),
    "flash-attn": ("no flash attention 2: packs use another kind", "pip install flash-attn"),
    "peft": ("no --lora-rank", 'pip install "lopd[peft]"'),
    "pyarrow": ("no parquet files", 'pip install "lopd[parquet]"'),
    "trl": ("no lopd.integrations.trl", 'pip install "lopd[trl]"'),
    "datasets": ("no lopd.integrations.datasets", 'pip install "lopd[datasets]"'),
    "ray": ("no lopd.integrations.ray", 'pip install "lopd[ray]"'),
    "math-verify": ("no --judge math", 'pip install "lopd[eval]"'),
    "matplotlib": ("no figures", 'pip install "lopd[bench]"'),
}
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
    findings = [*machine(), *devices(), *packages()]
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
        built = torch.version.cuda or torch.version.hip
        yield Finding(
            "gpu",
            f"none (torch is built for {built})" if built else "none (torch is built for CPUs)",
            "everything runs on the CPU: enough for lopd demo and for tests",
            "install a torch that is built for your GPU, see pytorch.org",
        )
        return
    yield Finding("driver", driver())
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


def driver() -> str:
    """The version of the GPU driver, as nvidia-smi states it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def packages() -> Iterator[Finding]:
    """The installed version of each package that lopd can use."""
    for name, (cost, remedy) in PACKAGES.items():
        try:
            yield Finding(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            where = f" in {sys.prefix}"
            yield Finding(name, "not installed", cost or f"lopd does not work{where}", remedy)
