"""Whether a training or evaluation stage has finished already, with these settings and inputs."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lopd.provenance import (
    MANIFEST_NAME,
    describe_model,
    difference,
    digests_of,
    read_manifest,
    settings_identity,
)
from lopd.store.folders import OutputFolder

LOG = logging.getLogger(__name__)


def is_finished(
    config: Any, stage: str, model: str, inputs: Callable[[Any], Mapping[str, Any]]
) -> bool:
    """Whether a stage's output is complete and was made with these settings from these inputs.

    Args:
        config: settings of the stage.
        stage: its name.
        model: folder of the model that the stage starts from or evaluates.
        inputs: describes the stage's other inputs; called with `config`.

    Raises:
        ConfigError: the output is complete, and its settings or inputs have changed; or it is
            that of another stage.
        DataError: its manifest is damaged.
    """
    out = Path(config.out)
    if not (out / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(out)
    if manifest.stage != stage:
        other = f"'{manifest.kind}' of 'lopd {manifest.stage}'"
        OutputFolder(out, "foreign", other).require_writable()
    expected = settings_identity(config)
    recorded = settings_identity(config, manifest.config)
    changed = difference({key: recorded.get(key) for key in expected}, expected)
    if not changed:
        recorded = digests_of({"model": manifest.base or manifest.model, **manifest.inputs})
        found = describe_model(model, dtype=config.dtype, engine="transformers")
        expected = digests_of({"model": found, **inputs(config)})
        changed = difference({key: recorded.get(key) for key in expected}, expected)
    if changed:
        OutputFolder(out, "other recipe", changed).require_writable()
    return True


def say_finished(out: str | Path) -> Path:
    """Print that there is nothing to do; returns the folder."""
    LOG.info(f"{out}: finished already, nothing to do")
    return Path(out)
