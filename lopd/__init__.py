"""lopd: offline on-policy distillation of language models.

Every stage of the pipeline is a function of its config, the same as the command of its name:
`lopd.distill(lopd.DistillConfig(...))` is `lopd distill ...`. `RolloutStore` and `TeacherCache`
read what the stages write. `Objective`, `step`, `train_loop` and `LopdTrainer` train in your own
code, and `run_with_loss` runs a loss inside a model. The errors that callers can cause are in
`lopd.errors`. The losses are in `lopd_kernels`, which does not depend on this package.

The names in `__all__` are imported on first use, so that `import lopd` loads neither torch nor
transformers.

>>> import lopd
>>> lopd.Objective("reverse_kl").tail
'bucket'
>>> lopd.DistillConfig(student="student", cache="cache", out="result").learning_rate
2e-06
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lopd import errors

if TYPE_CHECKING:
    from lopd.config.calibrate import CalibrateConfig
    from lopd.config.declare import DeclareConfig
    from lopd.config.demo import DemoConfig
    from lopd.config.distill import DistillConfig
    from lopd.config.doctor import DoctorConfig
    from lopd.config.evaluate import EvalConfig
    from lopd.config.import_scores import ImportConfig
    from lopd.config.inspect import InspectConfig
    from lopd.config.objective import Objective
    from lopd.config.plan import PlanConfig
    from lopd.config.report import ReportConfig
    from lopd.config.rollout import RolloutConfig
    from lopd.config.run import RunConfig
    from lopd.config.score import ScoreConfig
    from lopd.config.sft import SftConfig
    from lopd.config.sft_data import SftDataConfig
    from lopd.config.verify import VerifyConfig
    from lopd.models.head import run_with_loss
    from lopd.stages.calibrate import main as calibrate
    from lopd.stages.declare import main as declare
    from lopd.stages.demo import main as demo
    from lopd.stages.distill import main as distill
    from lopd.stages.doctor import main as doctor
    from lopd.stages.evaluate import main as evaluate
    from lopd.stages.import_scores import main as import_scores
    from lopd.stages.inspect import main as inspect
    from lopd.stages.plan import main as plan
    from lopd.stages.report import main as report
    from lopd.stages.rollout import main as rollout
    from lopd.stages.run import main as run
    from lopd.stages.score import main as score
    from lopd.stages.sft import main as sft
    from lopd.stages.sft_data import main as sft_data
    from lopd.stages.verify import main as verify
    from lopd.store import RolloutStore, TeacherCache
    from lopd.training.loop import train_loop
    from lopd.training.step import step
    from lopd.training.trainer import LopdTrainer

__version__ = "0.1.0"
__all__ = [
    "CalibrateConfig",
    "DeclareConfig",
    "DemoConfig",
    "DistillConfig",
    "DoctorConfig",
    "EvalConfig",
    "ImportConfig",
    "InspectConfig",
    "LopdTrainer",
    "Objective",
    "PlanConfig",
    "ReportConfig",
    "RolloutConfig",
    "RolloutStore",
    "RunConfig",
    "ScoreConfig",
    "SftConfig",
    "SftDataConfig",
    "TeacherCache",
    "VerifyConfig",
    "calibrate",
    "declare",
    "demo",
    "distill",
    "doctor",
    "errors",
    "evaluate",
    "import_scores",
    "inspect",
    "plan",
    "report",
    "rollout",
    "run",
    "run_with_loss",
    "score",
    "sft",
    "sft_data",
    "step",
    "train_loop",
    "verify",
]
_MODULES = {
    "CalibrateConfig": "lopd.config.calibrate",
    "DeclareConfig": "lopd.config.declare",
    "DemoConfig": "lopd.config.demo",
    "DistillConfig": "lopd.config.distill",
    "DoctorConfig": "lopd.config.doctor",
    "EvalConfig": "lopd.config.evaluate",
    "ImportConfig": "lopd.config.import_scores",
    "InspectConfig": "lopd.config.inspect",
    "LopdTrainer": "lopd.training.trainer",
    "Objective": "lopd.config.objective",
    "PlanConfig": "lopd.config.plan",
    "ReportConfig": "lopd.config.report",
    "RolloutConfig": "lopd.config.rollout",
    "RolloutStore": "lopd.store",
    "RunConfig": "lopd.config.run",
    "ScoreConfig": "lopd.config.score",
    "SftConfig": "lopd.config.sft",
    "SftDataConfig": "lopd.config.sft_data",
    "TeacherCache": "lopd.store",
    "VerifyConfig": "lopd.config.verify",
    "run_with_loss": "lopd.models.head",
    "step": "lopd.training.step",
    "train_loop": "lopd.training.loop",
}
# Functions that are the `main` of the module of that name in lopd.stages.
_STAGES = [
    "calibrate",
    "declare",
    "demo",
    "distill",
    "doctor",
    "evaluate",
    "import_scores",
    "inspect",
    "plan",
    "report",
    "rollout",
    "run",
    "score",
    "sft",
    "sft_data",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return import_module(f"lopd.stages.{name}").main
    if name not in _MODULES:
        raise AttributeError(f"module 'lopd' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
