"""On-policy distillation in a plain loop: no logits, and no teacher once it has scored."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lopd_kernels import linear_sparse_divergence, linear_topk

VOCAB, EOS, PROMPT, ANSWER, K = 128, 0, 4, 12, 8  # K teacher tokens at each position


def tiny_model(seed, width):  # replace with `from_pretrained` for your own model
    torch.manual_seed(seed)
    size = {"vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 2 * width}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    init = {"num_hidden_layers": 2, "initializer_range": 0.2, "eos_token_id": EOS}
    return Qwen3ForCausalLM(Qwen3Config(**size, **heads, **init)).eval()


def roll_out(student, count):
    prompts = torch.randint(1, VOCAB, (count, PROMPT))
    prompts[:, PROMPT - 2] = EOS  # many chat templates end each turn with it
    sampling = {"do_sample": True, "top_k": 0, "max_new_tokens": ANSWER, "pad_token_id": EOS}
    ids = student.generate(prompts, attention_mask=torch.ones_like(prompts), **sampling)
    ends = (ids[:, PROMPT:] == EOS).long()  # searched in the answer alone
    answer = ends.cumsum(1) - ends == 0  # up to and including its first EOS
    loss_mask = torch.cat([torch.zeros_like(prompts, dtype=torch.bool), answer], 1)
    attention_mask = torch.cat([torch.ones_like(prompts), answer.long()], 1)
    return {"input_ids": ids, "attention_mask": attention_mask, "loss_mask": loss_mask}


def answer_states(model, batch):  # [N, D], the states that predict answer tokens
    if not batch["loss_mask"].any(1).all():
        raise ValueError("a row has no token to train on; expected an answer in each")
    hidden = model.base_model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return hidden[:, :-1][batch["loss_mask"][:, 1:]]


def score(teacher, batch):
    with torch.no_grad():
        return linear_topk(answer_states(teacher, batch), teacher.lm_head.weight, K)


def distillation_loss(student, batch, top):  # head options: bias=, logit_scale=
    rows, weight, tail = answer_states(student, batch), student.lm_head.weight, top.tail_logprobs
    teacher = (top.ids, top.logprobs)
    return linear_sparse_divergence(rows, weight, *teacher, tail_logprobs=tail, reduction="mean")


def main(steps=40):
    student, teacher = tiny_model(0, width=32), tiny_model(1, width=64)
    data = [(batch, score(teacher, batch)) for batch in (roll_out(student, 16) for _ in range(2))]
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=3e-3), []
    for step in range(steps):
        loss = distillation_loss(student, *data[step % 2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step:2d}  reverse KL {losses[-1]:.3f} nat/token")
    return losses


if __name__ == "__main__":
    main()
