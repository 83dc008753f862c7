"""Input files: prompts, demonstrations and scores of other tools; alignment of tokens and logits.

Readers: `load_prompts`, `load_sft_jsonl`, `read_dump`. `check_prompts` checks prompts against the
limits of a model. `predicting_rows` maps tokens to the rows of hidden states that predict them.
"""

from lopd.data.alignment import predicting_rows, response_positions
from lopd.data.demonstrations import Demonstration, load_sft_jsonl
from lopd.data.external_scores import read_dump
from lopd.data.prompts import Prompt, check_prompts, load_prompts

__all__ = [
    "Demonstration",
    "Prompt",
    "check_prompts",
    "load_prompts",
    "load_sft_jsonl",
    "predicting_rows",
    "read_dump",
    "response_positions",
]
