"""Settings of `lopd run`."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting


@dataclass(kw_only=True)
class RunConfig(Settings):
    """Run the stages of a recipe that are not finished, in order (`lopd run recipe.yaml`)."""

    recipe: str = setting(help="YAML file; see lopd/stages/run.py for its keys.")
