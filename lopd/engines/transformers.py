"""The transformers engine: batched generation with a KV cache, scoring without logits."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lopd.data.alignment import predicting_rows, response_positions
from lopd.engines.base import Generation, Progress, Sampling, check_sequences
from lopd.errors import ConfigError, ModelError
from lopd.models.admission import attempt, ceiling, check_model
from lopd.models.architecture import context_of_config, head_rows_of
from lopd.models.head import HeadOptions, lm_head, run_with_loss
from lopd.models.limits import ModelLimits
from lopd.models.load import eos_token_ids, load_model, load_tokenizer
from lopd.models.machine import explaining_memory
from lopd.store import TeacherScores
from lopd_kernels import TopK, linear_topk

BATCH_SIZE = 64
_ONE_BY_ONE = "use --batch-size 1, which needs no padding, or --engine vllm"


class TransformersEngine:
    """A `transformers` causal LM that generates and scores.

    `batch_size` limits the sequences decoded together, `tokens_per_batch` the padded tokens scored
    together. The LM head is checked once against the model's logits, which refuses a head with an
    unknown scale or cap.
    """

    name = "transformers"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int | None = None,
        tokens_per_batch: int = 16384,
    ) -> None:
        batch_size = BATCH_SIZE if batch_size is None else batch_size
        if batch_size < 1 or tokens_per_batch < 1:
            raise ConfigError(
                f"batch_size={batch_size}, tokens_per_batch={tokens_per_batch}; "
                "expected positive numbers"
            )
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        self.vocab_size, self.context = head_rows_of(model), context_of_config(model.config)
        self._limits = ModelLimits("the scoring model", self.vocab_size, self.context)
        self.eos_ids = eos_token_ids(model.generation_config, tokenizer)
        self._can_generate = False  # until tried
        state_space = "cache_params" in inspect.signature(model.forward).parameters
        self._cache_name = "cache_params" if state_space else "past_key_values"
        check_model(model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str,
        device: str = "auto",
        local_rank: int | None = None,
        options: dict[str, Any] | None = None,
        **limits: Any,
    ) -> "TransformersEngine":
        """Load the model at `path`; `options` may hold a `device_map`.

        Raises:
            ModelError: the model cannot be loaded, or its LM head would be offloaded.
        """
        model = load_model(
            path, dtype=dtype, device=device, local_rank=local_rank, **(options or {})
        )
        if lm_head(model).weight.is_meta:
            raise ModelError(
                f"{path}: the device_map offloads the LM head, which scoring reads directly; keep "
                "it on a device"
            )
        return cls(model, load_tokenizer(path), **limits)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        progress: Progress | None = None,
    ) -> list[Generation]:
        """See `Engine.generate`. Prompts of similar length are decoded together."""
        if len(prompts) != len(seeds):
            raise ConfigError(f"generate: {len(prompts)} prompts but {len(seeds)} seeds")
        remedy = "use the tokenizer that belongs to the model"
        limits = ModelLimits("the model", self.vocab_size, id_remedy=remedy)
        for i, prompt in enumerate(prompts):
            limits.check(f"generate: prompt {i}", prompt)
        if not self._can_generate:
            self._can_generate = True
            remedy = _ONE_BY_ONE if self.batch_size > 1 else "use --engine vllm"
            attempt(self.model, "cached decoding", lambda: self._check_decoding(remedy), remedy)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: dict[int, Generation] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            longest = len(prompts[rows[-1]]) + sampling.max_new_tokens
            what = f"decoding {len(rows)} sequences of up to {longest} tokens"
            with explaining_memory(what, _smaller("--batch-size", len(rows), len(rows))):
                batch = self._generate_batch(
                    [prompts[i] for i in rows], sampling, [seeds[i] for i in rows], progress
                )
            results.update(zip(rows, batch, strict=True))
        return [results[i] for i in range(len(prompts))]

    def _check_decoding(self, remedy: str) -> None:
        """Compare log-probs of cached, padded decoding, one answer ending early, with `score`.

        Raises:
            ModelError: they differ by more than rounding.
        """
        eos, vocab = self.eos_ids, self.vocab_size
        prompts = [[vocab // 2, vocab - 1], [vocab // 3, 0, 1, vocab // 4, 2]]
        steps = 6 if self.context is None else min(6, self.context - 5)
        if steps < 2:
            return
        sampling = Sampling(steps)
        try:
            self.eos_ids = []
            first = self.generate(prompts, sampling, [0, 1])
            self.eos_ids = [int(first[0].tokens[1])]
            answers = self.generate(prompts, sampling, [0, 1])
        finally:
            self.eos_ids = eos
        tokens = [
            np.concatenate([np.asarray(p, np.int32), a.tokens])
            for p, a in zip(prompts, answers, strict=True)
        ]
        bound = 4 * ceiling(lm_head(self.model).weight)
        for score, answer in zip(self.score(tokens, [2, 5], 1), answers, strict=True):
            size = np.maximum(1.0, np.abs(score.teacher_logprobs))
            error = float((np.abs(answer.logprobs_raw - score.teacher_logprobs) / size).max())
            if not error <= bound:
                raise ModelError(
                    f"{type(self.model).__name__}: in cached decoding, log-probs "
                    f"differ by {error:.2g} from those of the whole sequence (expected at most "
                    f"{bound:.1g}); {remedy}"
                )

    def _generate_batch(
        self,
        prompts: list[Sequence[int]],
        sampling: Sampling,
        seeds: list[int],
        progress: Progress | None,
    ) -> list[Generation]:
        from transformers import DynamicCache

        device, steps = self.device, sampling.max_new_tokens
        uniforms = torch.from_numpy(
            np.stack([np.random.default_rng(seed).random(steps) for seed in seeds])
        ).to(device)
        inputs, mask = _pad(prompts, device, left=True)
        eos = torch.tensor(self.eos_ids, device=device)
        past = DynamicCache(config=self.model.config)
        alive = torch.arange(len(prompts), device=device)
        tokens = torch.full((len(prompts), steps), -1, dtype=torch.int64, device=device)
        logprobs = torch.zeros((2, len(prompts), steps), device=device)
        position = mask.cumsum(1) - 1
        for step in range(steps):
            logits = self.model(
                input_ids=inputs,
                # A recurrent state holds no padding, and its step takes no mask.
                attention_mask=None if step and self._cache_name == "cache_params" else mask,
                position_ids=position.clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_name: past},
            ).logits[:, -1]
            token, sampled, raw = draw(logits.float(), sampling, uniforms[alive, step])
            tokens[alive, step] = token
            logprobs[:, alive, step] = torch.stack([sampled, raw])
            unfinished = torch.isin(token, eos, invert=True)
            left = int(unfinished.sum()) if step + 1 < steps else 0
            if progress is not None and left < len(unfinished):
                progress(len(unfinished) - left)
            if not left:
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            inputs, position = token[:, None], position[:, -1:] + 1
            if left < len(unfinished):
                rows = unfinished.nonzero().squeeze(1)
                select_rows(past, rows)
                alive, mask = alive[rows], mask[rows]
                inputs, position = inputs[rows], position[rows]
        return _collect(tokens.cpu(), logprobs.cpu(), self.eos_ids, sampling)

    @torch.no_grad()
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
        """See `Engine.score`. Memory does not depend on the vocabulary times the tokens."""
        self._limits.check_k(k)
        check_sequences(sequences, prompt_lengths, self._limits, extra_ids)
        results: dict[int, TeacherScores] = {}
        for rows in _by_tokens(sequences, self.tokens_per_batch):
            longest = max(len(sequences[i]) for i in rows)
            what = f"scoring {len(rows)} sequences of up to {longest} tokens"
            remedy = _smaller("--tokens-per-batch", len(rows), len(rows) * longest)
            with explaining_memory(what, remedy):
                batch = self._score_batch(
                    [sequences[i] for i in rows],
                    [prompt_lengths[i] for i in rows],
                    k,
                    temperature,
                    None if extra_ids is None else [extra_ids[i] for i in rows],
                )
            results.update(zip(rows, batch, strict=True))
            if progress is not None:
                progress(len(rows))
        return [results[i] for i in range(len(sequences))]

    def _score_batch(
        self,
        sequences: list[np.ndarray],
        prompt_lengths: list[int],
        k: int,
        temperature: float,
        extra_ids: list[np.ndarray] | None,
    ) -> list[TeacherScores]:
        ids, mask = _pad(sequences, self.device, left=False)
        positions = [
            response_positions(prompt_length, len(tokens))
            for tokens, prompt_length in zip(sequences, prompt_lengths, strict=True)
        ]
        width = ids.shape[1]
        rows_of = [predicting_rows(p, row * width) for row, p in enumerate(positions)]
        index = torch.from_numpy(np.concatenate(rows_of))
        sampled = np.concatenate([t[p] for t, p in zip(sequences, positions, strict=True)])
        sampled_ids = torch.from_numpy(sampled.astype(np.int64))
        extra = None if extra_ids is None else torch.from_numpy(_pad_columns(extra_ids))

        def read(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions) -> TopK:
            rows = hidden.flatten(0, 1)[index.to(hidden.device)]
            return linear_topk(
                rows,
                weight,
                k,
                extra_ids=None if extra is None else extra.to(weight.device),
                sampled_ids=sampled_ids.to(weight.device),
                bias=bias,
                temperature=temperature,
                **head.kwargs(),
            )

        top = run_with_loss(self.model, {"input_ids": ids, "attention_mask": mask}, read)
        columns = [
            _floats(top.sampled_logprobs),
            _floats(top.entropy),
            top.ids.to(torch.int32).cpu().numpy(),
            _floats(top.logprobs),
            _floats(top.tail_logprobs),
        ]
        if extra is not None:
            columns += [extra.numpy(), *map(_floats, (top.extra_logprobs, top.extra_tail_logprobs))]
        ends = np.cumsum([len(p) for p in positions])[:-1]
        parts = zip(*(np.split(column, ends) for column in columns), strict=True)
        scores = [TeacherScores(*part) for part in parts]
        if extra_ids is None:
            return scores
        return [
            replace(
                score,
                extra_ids=asked.astype(np.int32),
                extra_logprobs=score.extra_logprobs[:, : asked.shape[1]],  # type: ignore[index]
            )
            for score, asked in zip(scores, extra_ids, strict=True)
        ]


def _smaller(flag: str, sequences: int, found: int) -> str:
    """The setting that needs less memory than a batch that did not fit."""
    if sequences == 1:
        return "a smaller --dtype, a device_map in --engine-options, or a device with more memory"
    return f"{flag} {found // 2} or less"


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep these rows of a cache in place, in layers of attention and of recurrent states alike."""
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, dict):
                kept = {key: _rows_of(item, rows) for key, item in value.items()}
                setattr(layer, name, kept)
            else:
                setattr(layer, name, _rows_of(value, rows))


def _rows_of(value: Any, rows: Tensor) -> Any:
    """The rows of a tensor [B, ...]; anything else, and a tensor without elements, as it is."""
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.numel():
        return value
    return value[rows.to(value.device)]


def _pad_columns(parts: list[np.ndarray]) -> np.ndarray:  # [sum R_i, max E_i] int64
    """Arrays [R_i, E_i] stacked along the rows; missing columns are -1."""
    width = max(1, *(part.shape[1] for part in parts))
    padded = np.full((sum(map(len, parts)), width), -1, np.int64)
    for part, rows in zip(parts, np.split(padded, np.cumsum([*map(len, parts)])[:-1]), strict=True):
        rows[:, : part.shape[1]] = part
    return padded


def _floats(values: Tensor | None) -> np.ndarray:
    assert values is not None
    return values.float().cpu().numpy()


def draw(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one token per row by inverse CDF.

    Args: logits [B, V] fp32, uniforms [B] in [0, 1).
    Returns: token ids, their log-probs under the sampling distribution, and at temperature 1
    with top_p 1. Greedy decoding reports the raw log-prob twice.
    """
    raw = torch.log_softmax(logits, dim=-1)
    if sampling.temperature == 0:
        token = raw.argmax(-1)
        picked = raw.gather(1, token[:, None]).squeeze(1)
        return token, picked, picked
    sampled = raw
    if not sampling.is_raw:
        sampled = torch.log_softmax(logits / sampling.temperature, dim=-1)
        if sampling.top_p < 1:
            ordered, ids = sampled.sort(dim=-1, descending=True)
            mass_before = ordered.exp().cumsum(-1) - ordered.exp()
            dropped = torch.zeros_like(sampled, dtype=torch.bool)
            dropped.scatter_(1, ids, mass_before >= sampling.top_p)
            sampled = torch.log_softmax(sampled.masked_fill(dropped, -torch.inf), dim=-1)
    cdf = sampled.double().exp().cumsum(-1)
    if not torch.isfinite(cdf[:, -1]).all():
        raise ModelError(
            "generate: the model returned NaN or infinite logits; check its weights, or use a "
            "wider --dtype"
        )
    target = (uniforms * cdf[:, -1]).unsqueeze(1)
    token = torch.searchsorted(cdf, target, right=True).squeeze(1)
    picked, raw = (values.gather(1, token[:, None]).squeeze(1) for values in (sampled, raw))
    return token, picked, raw


def _pad(
    sequences: Sequence[Any], device: torch.device, *, left: bool
) -> tuple[Tensor, Tensor]:  # ids [B, T] int64, attention mask [B, T] int64
    width = max(map(len, sequences))
    ids = torch.zeros((len(sequences), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(sequences):
        part = slice(width - len(tokens), width) if left else slice(len(tokens))
        ids[row, part], mask[row, part] = torch.as_tensor(tokens), 1
    return ids.to(device), mask.to(device)


def _collect(
    tokens: Tensor, logprobs: Tensor, eos_ids: list[int], sampling: Sampling
) -> list[Generation]:
    generations = []
    for row in range(len(tokens)):
        length = int((tokens[row] >= 0).sum())
        answer = tokens[row, :length].to(torch.int32).numpy()
        picked, raw = logprobs[:, row, :length].numpy()
        reason = "stop" if int(answer[-1]) in eos_ids else "length"
        generations.append(Generation(answer, reason, picked, picked if sampling.is_raw else raw))
    return generations


def _by_tokens(sequences: Sequence[np.ndarray], budget: int) -> Iterator[list[int]]:
    """Indices grouped by similar length, each at most `budget` padded tokens (or 1 sequence)."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * len(sequences[i]) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
