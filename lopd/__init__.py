"""lopd: offline on-policy distillation of language models.

The names in `__all__` are imported on first use, so that `import lopd` loads neither torch nor
transformers. Each stage (`lopd.stages.rollout`, `score`, `distill`, ...) has a config dataclass and
a `main`; `lopd --help` lists them as commands. The losses are in `lopd_kernels`, which does not
depend on this package.

>>> import lopd
>>> lopd.Objective("reverse_kl").tail
'bucket'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lopd import errors

if TYPE_CHECKING:
    from lopd.config.objective import Objective
    from lopd.models.head import run_with_loss
    from lopd.store import RolloutStore, TeacherCache
    from lopd.training.loop import train_loop
    from lopd.training.step import step
    from lopd.training.trainer import LopdTrainer

__version__ = "0.1.0"
__all__ = [
    "LopdTrainer",
    "Objective",
    "RolloutStore",
    "TeacherCache",
    "errors",
    "run_with_loss",
    "step",
    "train_loop",
]
_MODULES = {
    "LopdTrainer": "lopd.training.trainer",
    "Objective": "lopd.config.objective",
    "RolloutStore": "lopd.store",
    "TeacherCache": "lopd.store",
    "run_with_loss": "lopd.models.head",
    "step": "lopd.training.step",
    "train_loop": "lopd.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lopd' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
