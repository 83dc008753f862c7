"""Settings of `lopd plan`."""

from dataclasses import dataclass

from lopd.config.fields import parse_bytes, setting
from lopd.config.training import MemorySettings
from lopd.errors import ConfigError


@dataclass(kw_only=True)
class PlanConfig(MemorySettings):
    """Peak memory of a training run, and settings that make it fit (`lopd plan`).

    Reads only the model's config.json. Exits with 0 if the run fits, with 1 if it does not.
    """

    model: str = setting(help="Folder or hub id of the student; its config.json is enough.")
    gpu_memory: str = setting(help="Memory of the GPU: 24GiB (or 24G), 80GB, 24000MiB or bytes.")
    reserve: float = setting(
        0.05,
        within="[0, 1)",
        group="Memory",
        help="Share of the GPU's memory to keep free for what the plan does not count.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = parse_bytes("gpu_memory", self.gpu_memory)
        if self.gpu_memory.strip().isdigit() and size < 10_000:
            raise ConfigError(
                f"gpu_memory: found '{self.gpu_memory}', a number of bytes; expected a size such "
                f"as {self.gpu_memory}GiB"
            )
