"""What every stage that loads models does first: hub ids become folders, code is allowed or not."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from typing import Any, TypeVar

from lopd.config.import_scores import ImportConfig
from lopd.models.hub import local_folder
from lopd.provenance.remote_code import trusting_code

MODELS = ("model", "teacher", "student")  # the settings that name one
Config = TypeVar("Config")
Result = TypeVar("Result")


def loads_models(main: Callable[[Config], Result]) -> Callable[[Config], Result]:
    """A stage's `main` with local model folders in its config, and code run only if allowed."""

    @wraps(main)
    def prepared(config: Config) -> Result:
        with trusting_code(config.trust_remote_code):  # type: ignore[attr-defined]
            return main(with_local_models(config))

    return prepared


def with_local_models(config: Any) -> Any:
    """The config with the snapshot folder in place of each hub id.

    Not for `lopd import`, where a name may also stand for a model that is nowhere.
    """
    if isinstance(config, ImportConfig):
        return config
    names = {item.name for item in fields(config)}.intersection(MODELS)
    named = {name: getattr(config, name) for name in names}
    local = {name: local_folder(value) for name, value in named.items() if value is not None}
    changed = {name: value for name, value in local.items() if value != named[name]}
    return replace(config, **changed) if changed else config
