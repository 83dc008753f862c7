"""Settings of `lopd report`."""

from dataclasses import dataclass

from lopd.config.fields import setting
from lopd.config.inference import ScoringOptions
from lopd.config.training import refuse_unused
from lopd.errors import ConfigError


@dataclass(kw_only=True)
class ReportConfig(ScoringOptions):
    """One HTML page about one or several training runs (`lopd report`)."""

    runs: str = setting(
        identity=False,
        help="Folders that lopd distill or lopd sft wrote, side by side if there are several; "
        "with the flag, separated by commas.",
    )
    out: str | None = setting(
        None,
        identity=False,
        group="Model and data",
        help="The page to write; report.html in the first folder without it.",
    )
    evals: str | None = setting(
        None,
        identity=False,
        group="Evaluation",
        help="Folders that lopd eval wrote, separated by commas; by default those beside the runs "
        "that are of their models, before and after.",
    )
    answers: int = setting(
        8,
        within="[0, inf)",
        group="Evaluation",
        help="Answers of the cache to show token by token, which the models of the runs score; 0 "
        "loads no model.",
    )
    list_length: int = setting(
        8, within="[1, inf)", group="Evaluation", help="Tokens shown of each list."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.answers:
            names = ("list_length", "tokens_per_batch")  # not those that every stage has
            refuse_unused(self, names, "answers is 0, so no model is loaded; set answers")

    @property
    def folders(self) -> list[str]:
        """The folders of `runs`."""
        return split(self.runs, "runs")

    @property
    def eval_folders(self) -> list[str]:
        """The folders of `evals`."""
        return [] if self.evals is None else split(self.evals, "evals")


def split(text: str, name: str) -> list[str]:
    """Folders separated by commas."""
    folders = [part.strip() for part in text.split(",") if part.strip()]
    if not folders:
        raise ConfigError(f"{name}: found '{text}'; expected folders, separated by commas")
    return folders
