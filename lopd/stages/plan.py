"""Predict the peak memory of a training run (`lopd plan`)."""

from lopd.config.fields import parse_bytes
from lopd.config.parse import flag
from lopd.config.plan import PlanConfig
from lopd.config.training import MemorySettings
from lopd.errors import MemoryPlanError
from lopd.stages.model_access import loads_models
from lopd.stages.table import print_rows
from lopd.training.dry_run import meta_model
from lopd.training.memory import MemoryPlanner, proposals

GIB = 1 << 30


FLAGS = (  # the settings that `proposals` changes
    "gradient_checkpointing",
    "workspace_bytes",
    "batch_size",
    "max_tokens_per_batch",
    "optim",
)


def changed_flags(before: MemorySettings, after: MemorySettings) -> str:
    """The flags that turn the settings `before` into `after`."""
    flags = []
    for name in FLAGS:
        value = getattr(after, name)
        if value != getattr(before, name):
            if name == "workspace_bytes":
                value = f"{value >> 20}MiB"
            flags.append(flag(name) if value is True else f"{flag(name)} {value}")
    return " ".join(flags)


def _assumptions(config: PlanConfig) -> str:
    """One line: the settings that the plan depends on."""
    rows = (
        f"packs of {config.max_tokens_per_batch} tokens"
        if config.max_tokens_per_batch is not None
        else f"{config.batch_size} x {config.sequence_length} tokens"
    )
    k = "" if config.objective == "policy_gradient" else f" with lists of {config.k}"
    return (
        f"planned for {rows} a micro-batch, all with loss ({config.objective}{k}), {config.dtype} "
        f"weights, {config.optim}; set --sequence-length and --batch-size to yours"
    )


def gib(count: int) -> str:
    """Bytes in GiB, in words."""
    return f"{count / GIB:.2f} GiB"


@loads_models
def main(config: PlanConfig) -> None:
    """Print the memory of each part and, if the run does not fit, settings that need less.

    Raises:
        MemoryPlanError: the run does not fit.
        ConfigError, ModelError, MissingFileError: the settings or the model cannot be planned for.
    """
    installed = parse_bytes("gpu_memory", config.gpu_memory)
    memory = int((1 - config.reserve) * installed)
    planner = MemoryPlanner(meta_model(config.model, config.dtype, config))
    estimate = planner.estimate(config)
    print(_assumptions(config))
    sizes = {**vars(estimate), "total": estimate.total, "available": memory}
    print_rows([(name, gib(size)) for name, size in sizes.items()], right={1})
    if estimate.total <= memory:
        print(f"fits, {gib(memory - estimate.total)} to spare")
        return
    print("does not fit; each line adds to the one before:")
    rows, advice = [], "use a larger GPU or a smaller model"
    for candidate in proposals(planner, config, memory):
        total, flags = planner.estimate(candidate).total, changed_flags(config, candidate)
        rows.append((gib(total), "fits" if total <= memory else "no", flags))
        if total <= memory:  # only the last candidate can
            advice = f"train with {flags}"
    print_rows(rows, right={0})
    raise MemoryPlanError(
        f"{config.model}: needs {gib(estimate.total)} of the {gib(memory)} that a reserve of "
        f"{config.reserve:.0%} leaves of {gib(installed)}; {advice}"
    )
