"""Peak memory of a training run, before there is one (`lopd plan`)."""

from dataclasses import dataclass

from lopd.config.fields import setting
from lopd.errors import MemoryPlanError
from lopd.training.dry_run import meta_model
from lopd.training.memory import MemoryPlanner, MemorySettings, proposals
from lopd.training.options import parse_bytes

GIB = 1 << 30


@dataclass(kw_only=True)
class PlanConfig(MemorySettings):
    """Peak memory of a training run, and settings that make it fit (`lopd plan`).

    Reads only the model's config.json. Exits with 0 if the run fits, with 1 if it does not.
    """

    model: str = setting(help="Folder of the student; its config.json is enough.")
    gpu_memory: str = setting(help="Memory of the GPU: 24GiB, 80GB, 24000MiB or bytes.")
    reserve: float = setting(
        0.05,
        within="[0, 1)",
        group="Memory",
        help="Share of the GPU's memory to keep free for what the plan does not count.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_bytes("gpu_memory", self.gpu_memory)


def changes(before: MemorySettings, after: MemorySettings) -> str:
    """The flags that lead from one to the other."""
    flags = []
    for name in (
        "gradient_checkpointing",
        "workspace_bytes",
        "batch_size",
        "max_tokens_per_batch",
        "optim",
    ):
        value = getattr(after, name)
        if value != getattr(before, name):
            if name == "workspace_bytes":
                value = f"{value >> 20}MiB"
            flags.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(flags)


def gib(count: int) -> str:
    return f"{count / GIB:9.2f} GiB"


def main(config: PlanConfig) -> None:
    """Print the table, and what would make the run fit where it does not.

    Raises:
        MemoryPlanError: it does not fit.
        ConfigError, ModelError, MissingFileError: settings or a model that cannot be planned for.
    """
    installed = parse_bytes("gpu_memory", config.gpu_memory)
    memory = int((1 - config.reserve) * installed)
    planner = MemoryPlanner(meta_model(config.model, config.dtype, config))
    parts = planner.estimate(config)
    rows = [*vars(parts).items(), ("total", parts.total), ("available", memory)]
    print("\n".join(f"{name:<12}{gib(size)}" for name, size in rows))
    if parts.total <= memory:
        print(f"fits, {gib(memory - parts.total).strip()} to spare")
        return
    print("does not fit; one after the other:")
    fitting = None
    for candidate in proposals(planner, config, memory):
        total = planner.estimate(candidate).total
        fitting = candidate if total <= memory else None
        print(f"{gib(total)}  {'fits' if fitting else 'no':<4}  {changes(config, candidate)}")
    advice = "use a larger GPU or a smaller model"
    if fitting is not None:
        advice = f"train with {changes(config, fitting)}"
    raise MemoryPlanError(
        f"{config.model}: needs {gib(parts.total).strip()} of the {gib(memory).strip()} that a "
        f"reserve of {config.reserve:.0%} leaves of {gib(installed).strip()}; {advice}"
    )
