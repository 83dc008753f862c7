"""The setting of every stage that loads models: whether code in their folders may run."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting


@dataclass(kw_only=True)
class CodeOptions(Settings):
    """Whether Python code in model folders may run."""

    trust_remote_code: bool = setting(
        False,
        group="Model and data",
        identity=False,
        help="Run the Python code in model folders (auto_map). It can do anything; read it first.",
    )
