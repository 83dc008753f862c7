"""One training step in several processes: the functions that the processes run."""

import gc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers_training import make_rollouts, make_scored, tiny_model, tiny_moe, without_loss
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lopd.config.objective import Objective
from lopd.config.training import LoraOptions
from lopd.models.head import check_head, check_trainable, plain_model
from lopd.models.lora import add_lora
from lopd.training.batch import Collator
from lopd.training.step import step

WORLD = 2
# name: family, LoRA targets
MODELS = {
    "untied": ("qwen3", None),
    "tied": ("qwen3-tied", None),
    "biased": ("phi", None),
    "lora": ("qwen3", "q_proj,v_proj"),
    "lora-tied": ("qwen3-tied", "q_proj,v_proj"),
    "lora-head": ("qwen3", "q_proj,lm_head"),
    "moe": ("moe", None),
    "left-out": ("qwen3", None),
    "weighted": ("qwen3", None),
    "idle": ("qwen3", None),
    "idle-weighted": ("qwen3", None),
}
# The objective of a model; the reverse KL of others.
OBJECTIVES = {
    # the gradient is computed in the backward
    "left-out": Objective("reverse_kl", tolerance=0.05),
    "weighted": Objective("reverse_kl", token_weights="divergence_rank"),
    "idle-weighted": Objective("reverse_kl", token_weights="divergence_rank"),
}
WRAPPERS = ("ddp", "fsdp2", "fsdp2-head-alone")


def objective_of(name):
    return OBJECTIVES.get(name, Objective("reverse_kl"))


def build(name):
    family, targets = MODELS[name]
    if family == "moe":
        model = tiny_moe("qwen3_moe", num_hidden_layers=1)
    else:
        model = tiny_model(family, spread=3.0)
    if targets is None:
        return model
    options = LoraOptions(lora_rank=3, lora_alpha=6.0, lora_targets=targets)
    torch.manual_seed(5)
    model = add_lora(model, options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def wrap(model, wrapper):
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    plain = plain_model(model)
    head, backbone = plain.get_output_embeddings(), plain.base_model
    for layer in backbone.layers:
        fully_shard(layer)
    if wrapper == "fsdp2-head-alone":
        fully_shard(head)
    fully_shard(model)
    return model


def batches(name):
    """A batch for each process, of different lengths, and the normaliser of both.

    In the models called idle the last process has no token with loss.
    """
    items = make_scored(make_rollouts(4 * WORLD))
    shares = [items[rank::WORLD] for rank in range(WORLD)]
    if name.startswith("idle"):
        shares[-1] = [without_loss(item) for item in shares[-1]]
    made = [Collator()(share) for share in shares]
    return made, float(sum(len(batch["labels"]) for batch in made))


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradients(model):
    return {
        name.removeprefix("module."): whole(p.grad).clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def one_process(name):
    """Loss and gradients of the whole step without any wrapper."""
    model, (made, tokens), total = build(name), batches(name), 0.0
    for batch in made:
        loss, _ = step(model, batch, objective_of(name), tokens)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def rank_main(rank, folder, cases):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    try:
        for name, wrapper in cases:
            made, tokens = batches(name)
            model = wrap(build(name), wrapper)
            check_trainable(model)
            check_head(model)
            loss, _ = step(model, made[rank], objective_of(name), tokens)
            (WORLD * loss).backward()  # processes' gradients are averaged
            total = loss.detach().clone()
            dist.all_reduce(total)
            found = {"loss": total.item(), "gradients": gradients(model)}
            if rank == 0:
                torch.save(found, Path(folder) / f"{name}.{wrapper}.pt")
        del model, loss
        gc.collect()  # the wrappers refer to the group and must be freed before it
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(folder, cases):
    mp.spawn(rank_main, args=(str(folder), cases), nprocs=WORLD)
    return {
        (name, wrapper): torch.load(Path(folder) / f"{name}.{wrapper}.pt")
        for name, wrapper in cases
    }
