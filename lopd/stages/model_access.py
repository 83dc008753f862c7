"""What every stage that loads models does first: hub ids become folders, code is allowed or not."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import wraps
from typing import Any, TypeVar

from lopd.config.import_scores import ImportConfig
from lopd.errors import MissingFileError
from lopd.models.hub import local_folder
from lopd.provenance.remote_code import trusting_code

LOG = logging.getLogger(__name__)
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

    For imported scores a name may also stand for a model that is nowhere.
    """
    names = {item.name for item in fields(config)}.intersection(MODELS)
    named = {name: getattr(config, name) for name in names}
    may_be_nowhere = isinstance(config, ImportConfig) and config.format != "rollouts"
    find = _folder_or_name if may_be_nowhere else local_folder
    local = {n: local_models(value, find) for n, value in named.items() if value is not None}
    changed = {name: value for name, value in local.items() if value != named[name]}
    return replace(config, **changed) if changed else config


def local_models(value: Any, find: Callable[[str], str] = local_folder) -> Any:
    """The folder of a model, or of each of several by name."""
    if isinstance(value, Mapping):
        return {name: find(item) for name, item in value.items()}
    return find(value)


def _folder_or_name(value: str) -> str:
    """The folder of a model whose scores are imported; its name if it has none."""
    try:
        return local_folder(value)
    except MissingFileError as error:
        LOG.warning(f"{error}; '{value}' is taken as a name, by which no check can identify it")
        return value
