"""Settings of `lopd demo`."""

from dataclasses import dataclass
from functools import partial

from lopd.config.fields import Settings, setting

_data = partial(setting, group="Model and data")


@dataclass(kw_only=True)
class DemoConfig(Settings):
    """Run the whole pipeline at toy scale (`lopd demo`)."""

    out: str = _data("lopd-demo", identity=False, help="Folder of all artefacts.")
    seed: int = _data(0, within="[0, 4294967296)", help="Seed of models, data and sampling.")
    online: bool = _data(False, identity=False, help="Add the run with a live teacher.")
