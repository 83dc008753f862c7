"""Which form of the reverse KL trains best? A grid of runs on the demo's task.

    python -m benchmarks.objectives [--plan] [--only PATTERN ...] [--again] [--work DIR] [--out DIR]

For each seed, the demo's teacher and fine-tuned student are trained, the student is rolled out
once, and the teacher scores these rollouts at every length of list. A cell distils the student with
one form, one length and one learning rate, and evaluates it on prompts that no stage has seen:
sampled pass@1, and the exact KL to the teacher over the whole vocabulary, on the model's own
answers. Other cells leave out gradients outside the lists, or measure bias and noise of each form's
gradient with respect to the weights.

It is a part of the evidence, whose command (`benchmarks.evidence.command`) has the options.
"""

from benchmarks.evidence.command import main
from benchmarks.evidence.frame import Part
from benchmarks.evidence.objective_cells import cells
from benchmarks.evidence.objective_tables import (
    gradient_table,
    left_out_table,
    measures,
    training_table,
    verdict,
)

PART = Part(
    "objectives",
    cells,
    tables={
        "forms": training_table,
        "verdict": verdict,
        "left out": left_out_table,
        "gradient noise": gradient_table,
    },
    figures={},
    command="python -m benchmarks.objectives",
    measures=measures,
)

if __name__ == "__main__":
    main([PART])
