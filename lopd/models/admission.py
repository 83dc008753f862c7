"""Admission: what every stage asks of a model before it uses it.

A stage computes padded batches, packs and cached decoding, and takes each result for that of the
sequence alone. Whether that is so depends on the model's family, so it is tried on the model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lopd.errors import LopdError, ModelError
from lopd.models.architecture import context_of_config, head_rows_of, switches_of
from lopd.models.head import (
    check_finite,
    check_head,
    check_trainable,
    eval_mode,
    plain_model,
    run_with_loss,
)

LONGEST_PROBE = 512  # tokens; windows beyond are tried by `lopd.models.packing.check_packing` only


def check_model(model: Any, *, trained: bool = False) -> None:
    """Refuse a model that lopd cannot use exactly.

    Tried on a few tokens, beyond the model's windows and chunks up to LONGEST_PROBE: the outputs
    are finite, the head is known, later tokens do not change earlier ones, and neither does a
    longer sequence in the same padded batch.

    Args:
        trained: whether it will be trained, so that its router's loss is needed too.

    Raises:
        ModelError: which of these does not hold.
    """
    plain = plain_model(model)
    attempt(plain, "a few tokens", lambda: check_head(model))
    if trained:
        attempt(plain, "its router's loss", lambda: check_trainable(model))
    attempt(plain, "a padded batch", lambda: _check_neighbours(model))


def attempt(
    plain: Any,
    what: str,
    call: Callable[[], Any],
    remedy: str = "this architecture is not supported",
) -> Any:
    """The result of a probe; whatever fails inside it is a refusal.

    Raises:
        LopdError: as the probe.
        ModelError: the probe failed in another way.
    """
    try:
        return call()
    except (LopdError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{type(plain).__name__}: transformers fails on {what} ({type(error).__name__}: "
            f"{reason}); {remedy}"
        ) from error


def ceiling(values: Tensor) -> float:
    """The largest relative difference that can pass for rounding: half of the dtype's digits."""
    eps = torch.finfo(values.dtype).eps
    exact = torch.get_float32_matmul_precision() == "highest"
    if values.dtype == torch.float32 and values.is_cuda and not exact:
        eps = 2.0**-10  # TF32
    return eps**0.5


@torch.no_grad()
def _check_neighbours(model: Any) -> None:
    plain = plain_model(model)
    reach = [switch for switch in switches_of(plain.config) if switch <= LONGEST_PROBE]
    length = 8 + max(reach, default=8)
    if (context := context_of_config(plain.config)) is not None:
        length = min(length, context)
    device = next(model.parameters()).device
    ids = torch.linspace(0, head_rows_of(plain) - 1, length, device=device).long().flip(0)
    short = ids[: length // 2].flip(0)
    batch = {
        "input_ids": pad_sequence([short, ids], batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones_like(x) for x in (short, ids)], batch_first=True
        ),
    }
    with eval_mode(model):
        alone = hidden_of(model, one_row(short))[0]
        whole = hidden_of(model, one_row(ids))[0]
        prefix = hidden_of(model, one_row(ids[: length // 2]))[0]
        padded = hidden_of(model, batch)
    check_finite(model, whole)
    bound, name = ceiling(whole), type(plain).__name__
    if not (error := distance(whole[: length // 2], prefix)) <= bound:
        raise ModelError(
            f"{name}: later tokens change the hidden states of earlier ones by {error:.2g} of "
            f"their norm (expected at most {bound:.1g}); expected a causal LM"
        )
    pairs = ((padded[0, : length // 2], alone), (padded[1], whole))
    if not (error := max(distance(*pair) for pair in pairs)) <= bound:
        raise ModelError(
            f"{name}: in a padded batch its hidden states differ by {error:.2g} of their norm from "
            f"those of the sequence alone (expected at most {bound:.1g}); its batches cannot be "
            "trusted, and this architecture is not supported"
        )


def one_row(ids: Tensor) -> dict[str, Tensor]:
    """Inputs of one sequence [T]."""
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of `expected`."""
    expected = expected.float()
    return ((actual.float() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def hidden_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The last hidden states [B, T, D]."""
    return run_with_loss(model, inputs, lambda hidden, *_: hidden)
