"""The whole pipeline on a CPU, at toy scale or with a small chat model (`lopd demo`).

A teacher answers prompts, and a smaller student is fine-tuned on its answers and rolled out once;
its rollouts are scored once. From then on no teacher is needed: the student is distilled with the
sparse reverse KL and with the sampled-token objective. As a control, the same student is fine-tuned
for as many steps on new answers of the teacher. `--online` adds a run that samples new rollouts and
scores them with a live teacher at each step.

The task `arithmetic` (toy.py) trains two tiny models in minutes. The task `smollm2` (real.py) takes
SmolLM2-135M-Instruct from a package as the teacher and prunes the student from it.

All artefacts stay under `--out`, and the stage commands can be run on them.
"""

from pathlib import Path

from lopd.config.demo import DemoConfig
from lopd.stages.demo.driver import Demo, run_demo
from lopd.stages.demo.real import QuickRealDemo, RealDemo
from lopd.stages.demo.toy import ToyDemo

TASKS: dict[str, type[Demo]] = {"arithmetic": ToyDemo, "smollm2": RealDemo}
QUICK: dict[str, type[Demo]] = {"smollm2": QuickRealDemo}


def main(config: DemoConfig) -> Path:
    """Run or continue the demo of a task; see `lopd.stages.demo.driver.run_demo`.

    Raises:
        ConfigError: `out` holds a demo of another task or seed, or a package is missing.
        DataError: the record of the progress is damaged.
    """
    return run_demo((QUICK if config.quick else TASKS)[config.task], config)
