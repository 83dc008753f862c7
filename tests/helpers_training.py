"""Tiny models and random data for the tests of training."""

from dataclasses import replace
from inspect import isfunction, signature

import numpy as np
import torch

from lopd.config.objective import Objective
from lopd.config.training import TrainOptions
from lopd.store import Rollout, TeacherSequence, TopKLists
from lopd.training.batch import Collator, SequenceDataset

VOCAB = 40
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}

OBJECTIVES = [
    Objective("reverse_kl"),
    Objective("forward_kl", tail="renormalize"),
    Objective("jsd", beta=0.3, temperature=1.5),
    Objective("policy_gradient", advantage_clip=0.7),
    Objective("cross_entropy"),
]


def tiny_model(family="qwen3", seed=0, spread=1.0):
    """A random causal LM; `spread` scales the head's weight, so that soft caps matter."""
    import transformers as t

    kv = {"num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(seed)
    model = {
        "qwen3": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**SIZE, **kv, tie_word_embeddings=False, initializer_range=0.1)
        ),
        "qwen3-tied": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**SIZE, **kv, tie_word_embeddings=True, initializer_range=0.1)
        ),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SIZE, **kv, final_logit_softcapping=3.0, initializer_range=0.1)
        ),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**SIZE, **kv, final_logit_softcapping=2.0, initializer_range=0.1)
        ),
        "cohere": lambda: t.CohereForCausalLM(
            t.CohereConfig(**SIZE, logit_scale=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        ),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZE, logits_scaling=4.0)),
        "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZE, initializer_range=0.1)),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
                dropout=0.0,
            )
        ),
    }[family]()
    with torch.no_grad():
        if (bias := model.get_output_embeddings().bias) is not None:
            bias.normal_()
        model.get_output_embeddings().weight.mul_(spread)
    return model.eval()


def tiny_window():
    """A random causal LM whose tokens attend only to the last 4."""
    import transformers as t

    size = {**SIZE, "num_key_value_heads": 1, "initializer_range": 0.1}
    torch.manual_seed(0)
    return t.MistralForCausalLM(t.MistralConfig(**size, sliding_window=4)).eval()


def tiny_moe(family, **changes):
    import transformers as t

    size = {**SIZE, "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.2}
    qwen3 = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 16}
    config, model, specific = {
        "qwen3_moe": (t.Qwen3MoeConfig, t.Qwen3MoeForCausalLM, qwen3),
        "mixtral": (t.MixtralConfig, t.MixtralForCausalLM, {"num_local_experts": 4}),
        "olmoe": (t.OlmoeConfig, t.OlmoeForCausalLM, {"num_experts": 4}),
    }[family]
    torch.manual_seed(0)
    return model(config(**{**size, **specific, "router_aux_loss_coef": 0.3, **changes})).eval()


def make_rollouts(count=12, seed=0, shortest=3, longest=9, truncated=(), vocab=VOCAB):
    """Rollouts of random tokens, with prompts and answers of different lengths."""
    rng = np.random.default_rng(seed)
    rollouts = []
    for number in range(count):
        prompt, response = rng.integers(2, 5), rng.integers(shortest, longest + 1)
        tokens = rng.integers(0, vocab, prompt + response).astype(np.int32)
        logprobs = -rng.exponential(1.0, response).astype(np.float32)
        rollouts.append(
            Rollout(
                prompt_id=f"p{number}",
                sample=0,
                tokens=tokens,
                prompt_length=int(prompt),
                finish_reason="length" if number in truncated else "stop",
                loss_mask=np.arange(prompt + response) >= prompt,
                rollout_logprobs=logprobs,
                rollout_logprobs_raw=logprobs,
            )
        )
    return rollouts


def without_loss(item):
    """A scored sequence whose mask leaves nothing to train on."""
    mask = np.zeros(len(item.rollout.tokens), bool)
    return replace(item, rollout=replace(item.rollout, loss_mask=mask))


def make_scored(rollouts, k=4, seed=1):
    """The rollouts with the top k of a random teacher; lists of the first sequence are shorter."""
    rng = np.random.default_rng(seed)
    scored = []
    for number, rollout in enumerate(rollouts):
        length = len(rollout.tokens) - rollout.prompt_length
        logits = rng.normal(0, 2, (length, VOCAB))
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        width = k - 1 if number == 0 else k
        ids = np.argsort(-logprobs, axis=1)[:, :width]
        listed = np.take_along_axis(logprobs, ids, 1)
        sampled = logprobs[np.arange(length), rollout.tokens[rollout.prompt_length :]]
        scored.append(
            TeacherSequence(
                rollout=rollout,
                teacher_logprobs=sampled.astype(np.float32),
                teacher_entropy=-(np.exp(logprobs) * logprobs).sum(1).astype(np.float32),
                lists=TopKLists.from_padded(ids.astype(np.int32), listed.astype(np.float32)),
                tail_logprobs=np.log1p(-np.exp(listed).sum(1)).astype(np.float32),
            )
        )
    return scored


def scored(count=12, **kwargs):
    return make_scored(make_rollouts(count, **kwargs))


def near_rollouts(count=6, model=None, spread=0.4):
    """Scored sequences whose rollout log-probs are the model's plus noise."""
    model = model or tiny_model()
    items = make_scored(make_rollouts(count))
    generator = torch.Generator().manual_seed(3)
    for item in items:
        rollout = item.rollout
        tokens = torch.tensor(rollout.tokens[None].astype("int64"))
        log_p = torch.log_softmax(model(tokens).logits[0].detach(), -1)
        logprobs = log_p[:-1].gather(1, tokens[0, 1:, None])[rollout.prompt_length - 1 :, 0]
        moved = logprobs + spread * torch.randn(logprobs.shape, generator=generator)
        rollout.rollout_logprobs[:] = moved.clamp(max=0.0).numpy()
    return items


def options(**changes):
    defaults = {
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "min_lr_ratio": 0.1,
        "warmup_steps": 2,
        "weight_decay": 0.05,
        "device": "cpu",
        "save_every": 0,
        "log_every": 1,
    }
    if 0 < changes.get("max_steps", 6) < defaults["warmup_steps"]:
        defaults["warmup_steps"] = 0
    return TrainOptions(**{**defaults, **changes})


def flags_of(settings):
    """Settings as flags of a command; switches that are off are left out."""
    given = {name: value for name, value in settings.items() if value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def make_trainer(model, out, dataset=None, objective=None, aggregation="token_mean", **changes):
    from lopd.training.trainer import LopdTrainer

    dataset = SequenceDataset(make_scored(make_rollouts())) if dataset is None else dataset
    settings = options(**changes)
    return LopdTrainer(
        model,
        settings.training_arguments(out),
        objective or Objective("reverse_kl"),
        dataset,
        Collator(aggregation),
        max_tokens_per_batch=settings.max_tokens_per_batch,
    )


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


# Runs that differ only by rounding must agree to half of float32's digits. AdamW divides each
# gradient by its own size, so an element whose gradient is rounding noise may differ by any share.
SAME_UPDATE = torch.finfo(torch.float32).eps ** 0.5


def update_error(first, second, start):
    """|first - second| / |second - start|, over all tensors: relative to what training changed."""
    assert first.keys() == second.keys() <= start.keys()
    error = sum((first[name] - second[name]).double().square().sum().item() for name in first)
    moved = sum((second[name] - start[name]).double().square().sum().item() for name in first)
    assert moved > 0, "nothing was trained"
    return (error / moved) ** 0.5


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def check_overrides(kind, base, own):
    """A method that a library renames would otherwise be overridden in vain.

    `own` are the methods that `kind` and its ancestors add to `base`; it must have all others, with
    arguments that ours take.
    """
    ours = [each for each in kind.__mro__ if each not in base.__mro__]
    methods = {name for each in ours for name, value in vars(each).items() if isfunction(value)}
    for name in methods - own - {"__init__"}:
        found = signature(getattr(kind, name))
        if not any(p.kind is p.VAR_POSITIONAL for p in found.parameters.values()):
            theirs = signature(getattr(base, name)).parameters.values()
            found.bind(*[p for p in theirs if p.default is p.empty])
    assert not own & {*dir(base)} and methods > own


def make_deaf(model):
    """Keep the lengths of a pack's sequences from a layer, which then mixes them."""
    layer = model.model.layers[0].self_attn
    forward = layer.forward

    def deaf(*args, **kwargs):
        kwargs.pop("sequence_lengths", None)
        return forward(*args, **kwargs)

    layer.forward = deaf
