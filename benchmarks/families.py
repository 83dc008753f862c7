"""Which model families work in which stage? Writes docs/models.md: `python -m benchmarks.families`.

For every causal-LM family in transformers a tiny random model goes through what the stages do, and
each result is compared with the model's own logits, computed for one sequence at a time without a
cache:

    load        the folder is saved and read, and its admission checks pass
    generate    a padded batch whose answers end at different times; tokens and log-probs
    score       a padded batch; log-probs of the sampled tokens and of the top 4
    train       the gradient of one micro-batch, also with gradient checkpointing
    pack        the same gradient from a pack
    LoRA        adapters on all linear layers: a step, and merging
    plan        the memory plan
    save        the trained model saved and read again

A cell is `yes`, `no` with the sentence of the refusal, or a fault: `WRONG` or `CRASH`. The exit
code is 1 if there is a fault.
"""

import argparse
import contextlib
import copy
import io
import os
import re
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.tiny_families import VOCAB, families, tiny_model
from lopd.config.objective import Objective
from lopd.config.training import LoraOptions, MemorySettings
from lopd.data.demonstrations import Demonstration
from lopd.engines.base import Sampling
from lopd.engines.transformers import TransformersEngine
from lopd.errors import LopdError
from lopd.models.admission import check_model
from lopd.models.architecture import ROUTER_COEFFICIENTS
from lopd.models.load import load_model
from lopd.models.lora import add_lora, merged
from lopd.models.packing import check_packing, pack_attention
from lopd.training.batch import Collator
from lopd.training.dry_run import meta_model
from lopd.training.memory import MemoryPlanner
from lopd.training.step import step

LENGTHS = ((4, 23), (2, 7), (9, 14), (3, 30))  # (prompt, whole sequence); windows are 8 long
EOS = tuple(range(2, VOCAB, 6))  # so many ids end an answer that answers end at different times
TOLERANCE = 2e-4  # float32, two to four layers, sizes near 1; a wrong mask gives more than 1e-2
STAGES = ("load", "generate", "score", "train", "pack", "LoRA", "plan", "save")


class WrongError(Exception):
    """A stage ran and gave another result than the model's own logits."""


@dataclass
class Row:
    """What happened to one family, by stage: "yes", or why not."""

    family: str
    model: str = ""
    cells: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        return [f"{self.family}: {s}: {c}" for s, c in self.cells.items() if c.startswith(FAULTS)]


FAULTS = ("WRONG", "CRASH")


def close(what: str, found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Raise WrongError unless both are equal within `tolerance` times the largest, or 1."""
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        raise WrongError(f"{what} {tuple(found.shape)}, not {tuple(expected.shape)}")
    error = ((found - expected).abs().max() / max(1.0, expected.abs().max().item())).item()
    if not error <= tolerance:
        raise WrongError(f"{what} differ by {error:.2g}")


def sequences(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, length).astype(np.int32) for _, length in LENGTHS]


class Family:
    """One family's tiny model in a folder, and what its stages should give."""

    def __init__(self, kind: str, folder: Path, tokenizer: Any, changes: dict[str, Any]) -> None:
        self.folder, self.packs = folder, False
        model = tiny_model(kind, **changes)
        model.generation_config.eos_token_id = list(EOS)
        model.save_pretrained(folder)
        exact = "sdpa" if kind == "moshi" else "eager"  # moshi's eager attention sees later tokens
        self.source = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=exact
        )
        tokenizer.save_pretrained(folder)
        self.demonstrations = [
            Demonstration(f"p{i}", 0, tokens, prompt, "stop", np.arange(len(tokens)) >= prompt)
            for i, (tokens, (prompt, _)) in enumerate(zip(sequences(), LENGTHS, strict=True))
        ]

    def load(self) -> Any:
        """The model, without a router's loss, which is not a sum over sequences."""
        if not hasattr(self, "model"):
            model = load_model(self.folder, dtype="float32", device="cpu")
            check_model(model, trained=True)
            for owner in (model, model.config.get_text_config()):
                for name in ROUTER_COEFFICIENTS:
                    if getattr(owner, name, None):
                        setattr(owner, name, 0.0)
            self.model = model
        return copy.deepcopy(self.model).train()

    def logprobs(self, tokens: Any) -> Tensor:  # [T, V]
        """The model's own, in eager attention, without padding, cache, or anything of lopd."""
        ids = torch.as_tensor(np.asarray(tokens)).long()[None]
        with torch.no_grad():
            return self.source(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)

    def check_load(self) -> None:
        self.engine = TransformersEngine.load(self.folder, dtype="float32", device="cpu")

    def check_generate(self) -> None:
        prompts = [s[:p].tolist() for s, (p, _) in zip(sequences(1), LENGTHS, strict=True)]
        for temperature in (1.0, 0.0):
            sampling = Sampling(20, temperature)
            for answer, prompt in zip(
                self.engine.generate(prompts, sampling, range(4)), prompts, strict=True
            ):
                logprobs = self.logprobs([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
                picked = logprobs.gather(1, torch.as_tensor(answer.tokens).long()[:, None])[:, 0]
                close("log-probs of generated tokens", answer.logprobs_raw, picked)
                if temperature == 0:
                    close("greedy log-probs", picked, logprobs.max(-1).values)

    def check_score(self) -> None:
        tokens, prompts = sequences(), [prompt for prompt, _ in LENGTHS]
        for one, prompt, score in zip(
            tokens, prompts, self.engine.score(tokens, prompts, 4), strict=True
        ):
            logprobs = self.logprobs(one)[prompt - 1 : -1]
            sampled = torch.as_tensor(one[prompt:]).long()[:, None]
            close("log-probs of sampled", score.teacher_logprobs, logprobs.gather(1, sampled)[:, 0])
            close("top log-probs", score.topk_logprobs, logprobs.topk(4).values)

    def gradients(self, model: Any, packed: bool = False) -> dict[str, Tensor]:
        batch = Collator(packed=packed)(self.demonstrations)
        model.zero_grad()
        loss, _ = step(model, batch, Objective("cross_entropy"), float(len(batch["labels"])))
        loss.backward()
        return _gradients(model)

    def dense_gradients(self, model: Any) -> dict[str, Tensor]:
        """Of the mean loss, from the logits of each sequence alone; without a router's loss."""
        model.zero_grad()
        total = sum(len(d.tokens) - d.prompt_length for d in self.demonstrations)
        for item in self.demonstrations:
            ids = torch.as_tensor(item.tokens).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            rows = slice(item.prompt_length - 1, len(ids) - 1)
            labels = ids[item.prompt_length :]
            loss = nn.functional.cross_entropy(logits[rows].float(), labels, reduction="sum")
            (loss / total).backward()
        return _gradients(model)

    def check_train(self) -> None:
        model = self.load()
        self.expected = self.dense_gradients(model)
        _close_gradients(self.gradients(model), self.expected)
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable()
            _close_gradients(self.gradients(model), self.expected, "checkpointed")

    def check_pack(self) -> None:
        model = self.load()
        path = pack_attention(model)
        check_packing(model, path)
        self.packs = True
        _close_gradients(self.gradients(model, packed=True), self.expected)

    def check_lora(self) -> None:
        model = add_lora(self.load(), LoraOptions(lora_rank=2))
        self.gradients(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        merged(model)

    def check_plan(self) -> None:
        for dtype in ("float32", "bfloat16"):
            planner = MemoryPlanner(meta_model(str(self.folder), dtype))
            extras: list[dict[str, Any]] = [{}]
            if self.source.supports_gradient_checkpointing:
                extras.append({"gradient_checkpointing": True})
            if self.packs:
                extras.append({"max_tokens_per_batch": 128})
            for extra in extras:
                settings: Any = {"sequence_length": 64, "batch_size": 2, **extra}
                planner.estimate(MemorySettings(**settings))

    def check_save(self) -> None:
        out = self.folder / "again"
        model = load_model(self.folder, dtype="float32", device="cpu")
        model.save_pretrained(out)
        again = load_model(out, dtype="float32", device="cpu")
        ids = torch.arange(3, 20)[None]
        close("logits", _logits(again, ids), _logits(model, ids))


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], what: str = "") -> None:
    if differing := found.keys() ^ expected.keys():
        raise WrongError(f"{what} gradients of {min(differing)} in one only")
    size = max(g.abs().max().item() for g in expected.values())
    for name, value in expected.items():
        error = (found[name] - value).abs().max().item() / size
        if not error <= TOLERANCE:
            raise WrongError(f"{what} gradient of {name} differs by {error:.2g}")


def attempt(call: Callable[[], object]) -> str:
    """ "yes", the sentence of a refusal, or a fault."""
    try:
        call()
    except LopdError as error:
        return str(error)
    except WrongError as error:
        return f"WRONG: {error}"
    except Exception as error:
        if os.environ.get("TRACE"):
            traceback.print_exc()
        return f"CRASH: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return "yes"


def try_family(kind: str, tokenizer: Any, **changes: Any) -> Row:
    """Every stage of one family; a stage after a refusal to load is not tried."""
    row = Row(kind)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        try:
            family = Family(kind, Path(folder), tokenizer, changes)
        except Exception as error:
            row.cells = {"load": f"not built: {' '.join(str(error).split())[:120]}"}
            return row
        row.model = type(family.source).__name__
        for stage in STAGES:
            if row.cells.get("load", "yes") == "yes":
                row.cells[stage] = attempt(getattr(family, f"check_{stage.lower()}"))
    return row


def byte_tokenizer() -> Any:
    """A tokenizer with one id per letter."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(33 + i): 3 + i for i in range(VOCAB - 3)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; all by default")
    parser.add_argument("--out", help="Markdown file to write")
    args = parser.parse_args(arguments)
    tokenizer, rows = byte_tokenizer(), []
    for kind in args.families or families():
        rows.append(try_family(kind, tokenizer))
        for stage, cell in rows[-1].cells.items():
            if cell != "yes":
                print(f"{kind}: {stage}: {cell}", flush=True)
    faults = [fault for row in rows for fault in row.faults]
    print(f"{len(faults)} faults")
    if args.out:
        Path(args.out).write_text(report(rows), encoding="utf-8")
    return int(bool(faults))


def report(rows: list[Row]) -> str:
    """The page docs/models.md."""
    built = [row for row in rows if row.model]
    whole = [row.family for row in built if set(row.cells.values()) == {"yes"}]
    lines = [*_HEADER.format(version=transformers.__version__).splitlines(), ""]
    lines += ["## Every stage", "", *textwrap.wrap(", ".join(whole) + ".", 98), ""]
    lines += ["## Some stages", "", "| family | " + " | ".join(STAGES) + " |"]
    lines += ["| --- |" + " --- |" * len(STAGES)]
    reasons: dict[str, list[str]] = {}
    for row in built:
        if row.family in whole:
            continue
        cells = []
        for stage in STAGES:
            cell = row.cells.get(stage, "")
            cells.append(cell if cell in ("yes", "") else "no")
            if cell not in ("yes", ""):
                reasons.setdefault(f"{stage}: {_general(cell)}", []).append(row.family)
        lines.append(f"| {row.family} | " + " | ".join(cells) + " |")
    lines += ["", "## What the refusals say", ""]
    for reason, kinds in sorted(reasons.items()):
        lines += textwrap.wrap(f"* {reason} ({', '.join(kinds)})", 98, subsequent_indent="  ")
    missing = [row.family for row in rows if not row.model]
    lines += ["", "## Not tried", "", "Their default configs build no small model here:"]
    lines += [*textwrap.wrap(", ".join(missing) + ".", 98), ""]
    return "\n".join(lines)


_HEADER = """\
# Models

What `python -m benchmarks.families --out docs/models.md` found with transformers {version}, on tiny
random models in float32 on a CPU. Each stage's result was compared with the model's own logits for
one sequence at a time: log-probs of generated tokens whose answers end at different times, scores
of a padded batch, gradients of a padded batch and of a pack, with checkpointing too.

Every stage tries the model before it starts and refuses one that it cannot use exactly. Windows and
chunks of up to 512 tokens are tried at loading, longer ones only before training with packs.
"generate" is about the transformers engine; vLLM has its own list of models. Three settings of a
config limit the length of a sequence: `max_position_embeddings`, and
`original_max_position_embeddings` with longrope and `index_topk` of sparse attention, beyond which
transformers lets the other rows of a batch change the result."""


def _general(cell: str) -> str:
    """A refusal without the model's name and the numbers that differ between models."""
    cell = re.sub(r"/\S+/tmp\w+", "FOLDER", cell).partition(": ")[2]
    cell = re.sub(r"\d+\.\d+(e-\d+)?|\d+e-\d+|(?<=by )\d+", "N", cell)
    cell = re.sub(r" \(model_type='\w+'\)", "", cell)
    cell = re.sub(r"(?<=modules: ){.*?}", "{...}", cell)
    return re.sub(r"(weight of|such as) \S+", r"\1 ...", cell)


if __name__ == "__main__":
    sys.exit(main())
