"""The vLLM engine: fast sampling and scoring, without entropy and with a derived tail.

vLLM returns top-k lists, so the mass outside a list is computed here by subtraction and there is
no entropy; the transformers engine computes both. Log-probs of prompts are raw at any
temperature, so a scoring temperature other than 1 is refused.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lopd.data.alignment import predicting_rows, response_positions
from lopd.engines.base import Generation, Progress, Sampling, check_sequences
from lopd.engines.vllm_output import (
    by_entries,
    check_readable,
    ids_to_ask,
    look_up,
    read_chosen,
    read_prompt_logprobs,
    to_scores,
    with_extra,
)
from lopd.errors import ConfigError, DataError, ModelError
from lopd.models.limits import ModelLimits
from lopd.models.load import check_model_folder, context_of, load_tokenizer
from lopd.provenance import eos_ids_of, vocab_size_of
from lopd.provenance.remote_code import is_code_trusted
from lopd.store import TeacherScores

# vLLM raises lower temperatures to this one.
LOWEST_TEMPERATURE = 0.01


class VllmEngine:
    """A vLLM model that generates and scores.

    vLLM returns the log-probs of the sampling distribution. Where temperature or top_p change it,
    a second pass over prompt and answer computes the raw log-probs.
    """

    name = "vllm"

    def __init__(
        self, llm: Any, tokenizer: Any, *, vocab_size: int, context: int | None, eos_ids: list[int]
    ) -> None:
        self.llm, self.tokenizer = llm, tokenizer
        self.vocab_size, self.context, self.eos_ids = vocab_size, context, eos_ids
        self._limits = ModelLimits("the scoring model", vocab_size, context)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str,
        device: str = "auto",
        local_rank: int | None = None,
        options: dict[str, Any] | None = None,
    ) -> "VllmEngine":
        """Start vLLM on a local model folder.

        Without `max_model_len` a sequence may fill the model's context. vLLM needs room for one
        token after those that it scores, so its context is set one token longer; that position is
        never computed.

        Raises:
            ConfigError: vllm is not installed, or was built for another device.
            ModelError: vLLM cannot run the model.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "engine: vllm is not installed here; pip install 'lopd[vllm]' into an environment "
                "of its own, or use --engine transformers"
            )
        folder, options = check_model_folder(path), dict(options or {})
        eos_ids = eos_ids_of(folder)
        if eos_ids is None:
            raise ModelError(
                f"{folder}: neither its generation config nor its tokenizer names an "
                "end-of-sequence token; set eos_token_id in generation_config.json"
            )
        tokenizer, vocab_size = load_tokenizer(folder), vocab_size_of(folder)
        context = context_of(folder, "vllm")
        if "max_model_len" in options:
            context = options["max_model_len"] - 1
        elif context is not None:
            options["max_model_len"] = context + 1
        if local_rank is not None:
            sizes = ("tensor_parallel_size", "pipeline_parallel_size")
            _choose_gpus(local_rank, math.prod(options.get(size, 1) for size in sizes))
        with _environment(VLLM_ALLOW_LONG_MAX_MODEL_LEN="1"):
            llm = _start(folder, dtype, device, vocab_size, options)
        return cls(llm, tokenizer, vocab_size=vocab_size, context=context, eos_ids=eos_ids)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """See `Engine.generate`."""
        from vllm import SamplingParams

        if len(prompts) != len(seeds):
            raise ConfigError(f"generate: {len(prompts)} prompts but {len(seeds)} seeds")
        if 0 < sampling.temperature < LOWEST_TEMPERATURE:
            raise ConfigError(
                f"temperature: found {sampling.temperature}; vllm would raise it to "
                f"{LOWEST_TEMPERATURE}: use that or more, or 0 for greedy decoding"
            )
        self._check_room(prompts, sampling.max_new_tokens)
        parameters = [
            SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
                stop_token_ids=self.eos_ids,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
        ]
        outputs = self._run(prompts, parameters)
        answers = [self._read_answer(i, output.outputs[0]) for i, output in enumerate(outputs)]
        if sampling.is_raw or sampling.temperature == 0:
            raw = [logprobs for _, _, logprobs in answers]
        else:
            raw = self._raw_logprobs(prompts, [tokens for tokens, _, _ in answers])
        if progress is not None:
            progress(len(answers))
        return [Generation(*answer, r) for answer, r in zip(answers, raw, strict=True)]

    def score(
        self,
        sequences: Sequence[np.ndarray],
        prompt_lengths: Sequence[int],
        k: int,
        *,
        temperature: float = 1.0,
        extra_ids: Sequence[np.ndarray] | None = None,
        progress: Progress | None = None,
    ) -> list[TeacherScores]:
        """See `Engine.score`; the entropy is NaN, and the tail is `lists.derived_tail`.

        Extra ids are scored by `prompt_logprob_token_ids`. A vLLM without it returns the whole
        vocabulary, from which they are read, if that is not too much.

        Raises:
            ConfigError: a temperature other than 1, or extra ids that this vLLM cannot score.
        """
        if temperature != 1.0:
            raise ConfigError(
                f"temperature: found {temperature}; vllm scores only at 1; use --engine "
                "transformers"
            )
        self._limits.check_k(k)
        check_sequences(sequences, prompt_lengths, self._limits, extra_ids)
        by_ids = extra_ids is not None and self.scores_chosen_ids
        read = k if extra_ids is None or by_ids else self.vocab_size
        if read > k:
            check_readable(sequences, read)
        scores: list[TeacherScores] = []
        for part in by_entries(sequences, read + 1):
            asked = [extra_ids[i] for i in part] if extra_ids is not None and by_ids else None
            outputs = self._read_prompts(sequences, part, read, asked)
            for i, output in zip(part, outputs, strict=True):
                listed = read_prompt_logprobs(i, output.prompt_logprobs, sequences[i], read)
                rows = predicting_rows(response_positions(prompt_lengths[i], len(sequences[i])))
                ids, logprobs = (array[rows] for array in listed)
                top = to_scores(i, ids[:, : k + 1], logprobs[:, : k + 1], self.vocab_size)
                if extra_ids is not None:
                    found = (
                        read_chosen(i, output.prompt_token_id_logprobs, ids, logprobs, extra_ids[i])
                        if by_ids
                        else look_up(ids, logprobs, extra_ids[i])
                    )
                    top = with_extra(i, top, ids[:, 0], extra_ids[i], found, self.vocab_size)
                scores.append(top)
            if progress is not None:
                progress(len(part))
        return scores

    @property
    def scores_chosen_ids(self) -> bool:
        """Whether vLLM can score ids that are chosen for each token of a prompt."""
        from vllm import SamplingParams

        known = "prompt_logprob_token_ids" in SamplingParams.__struct_fields__
        return known and bool(self.llm.llm_engine.vllm_config.use_v2_model_runner)

    def _check_room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        remedy = "lower --max-new-tokens or raise max_model_len"
        limits = ModelLimits("vllm", self.vocab_size, self.context, length_remedy=remedy)
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise DataError(f"prompt {i}: has no tokens; expected at least one")
            limits.check(f"prompt {i}", prompt, max_new_tokens=max_new_tokens)

    def _run(self, prompts: Sequence[Sequence[int]], parameters: Any) -> list[Any]:
        requests = [{"prompt_token_ids": [int(token) for token in prompt]} for prompt in prompts]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        if len(outputs) != len(requests) or not all(output.finished for output in outputs):
            raise ModelError(
                f"vllm: {len(requests)} requests, {sum(o.finished for o in outputs)} finished; "
                "see its log"
            )
        return outputs

    def _read_answer(self, i: int, answer: Any) -> tuple[np.ndarray, str, np.ndarray]:
        """(tokens [R] int32, finish reason, log-probs [R] fp32) of one answer, checked."""
        tokens = np.asarray(answer.token_ids, np.int32)
        logprobs = np.asarray(answer.logprobs.logprobs, np.float32)
        listed = np.asarray(answer.logprobs.token_ids)
        if len(tokens) < 1 or logprobs.shape != tokens.shape or (listed != tokens).any():
            raise ModelError(
                f"vllm: answer {i} has {len(tokens)} tokens and {len(logprobs)} log-probs; "
                "expected one of every token"
            )
        if not np.isfinite(logprobs).all():
            raise ModelError(
                f"vllm: answer {i} has log-prob {logprobs[~np.isfinite(logprobs)][0]}; check the "
                "model's weights, or use a wider --dtype"
            )
        stopped = int(tokens[-1]) in self.eos_ids
        if answer.finish_reason not in ("stop", "length") or (
            answer.finish_reason == "stop" and not stopped
        ):
            raise ModelError(
                f"vllm: answer {i} ended with finish reason {answer.finish_reason!r} on token "
                f"{tokens[-1]}; expected 'length', or 'stop' on one of {self.eos_ids}"
            )
        return tokens, "stop" if stopped else "length", logprobs

    def _raw_logprobs(
        self, prompts: Sequence[Sequence[int]], answers: list[np.ndarray]
    ) -> list[np.ndarray]:
        sequences = [
            np.concatenate([np.asarray(prompt, np.int64), answer])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        raw = []
        for part in by_entries(sequences, 1):
            for i, output in zip(part, self._read_prompts(sequences, part, 0), strict=True):
                _, logprobs = read_prompt_logprobs(i, output.prompt_logprobs, sequences[i], 0)
                positions = response_positions(len(prompts[i]), len(sequences[i]))
                raw.append(logprobs[predicting_rows(positions), 0])
        return raw

    def _read_prompts(
        self,
        sequences: Sequence[np.ndarray],
        part: range,
        k: int,
        asked: Sequence[np.ndarray] | None = None,  # ids of the last tokens of each sequence
    ) -> list[Any]:
        from vllm import SamplingParams

        settings: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": k,
            "flat_logprobs": True,
            "detokenize": False,
        }
        parameters: Any = SamplingParams(**settings)
        if asked is not None:
            parameters = [
                SamplingParams(
                    **settings,
                    prompt_logprob_token_ids=ids_to_ask(sequences[i], ids),
                    prompt_logprob_start=len(sequences[i]) - 1 - len(ids),
                )
                for i, ids in zip(part, asked, strict=True)
            ]
        return self._run([sequences[i].tolist() for i in part], parameters)


def _start(folder: Path, dtype: str, device: str, vocab_size: int, options: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.platforms import current_platform

    if device != "auto" and device != current_platform.device_type:
        raise ConfigError(
            f"device: found '{device}'; the installed vllm runs on {current_platform.device_type}"
        )
    try:
        llm = LLM(
            model=str(folder),
            dtype=dtype,
            logprobs_mode="processed_logprobs",
            max_logprobs=vocab_size,
            trust_remote_code=is_code_trusted(),
            **options,
        )
    except Exception as error:  # vLLM raises exceptions of many types
        found = " ".join((str(error).strip() or type(error).__name__).split())
        raise ModelError(f"{folder}: vllm cannot run it ({found})") from error
    rows = llm.llm_engine.model_config.get_vocab_size()
    if rows != vocab_size:
        raise ModelError(
            f"{folder}: vllm sees {rows} vocabulary rows, config.json says {vocab_size}; score it "
            "with --engine transformers"
        )
    return llm


def _choose_gpus(local_rank: int, count: int) -> None:
    """Restrict this process to its share of the visible GPUs."""
    import torch

    visible = torch.cuda.device_count()
    if not visible:
        return
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = value.split(",") if value else [str(i) for i in range(visible)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(local_rank, count, names))


def gpus_of(local_rank: int, count: int, names: list[str]) -> list[str]:
    """The `count` GPUs of process `local_rank`, in order of rank."""
    chosen = names[local_rank * count : (local_rank + 1) * count]
    if len(chosen) < count:
        raise ConfigError(
            f"LOCAL_RANK {local_rank}: needs GPUs {local_rank * count} to "
            f"{(local_rank + 1) * count - 1}, and {len(names)} are visible; start fewer workers"
        )
    return chosen


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the duration of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
