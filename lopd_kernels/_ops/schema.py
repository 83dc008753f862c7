"""What the operators share: arguments, registration, and the state of their backward.

An operator is a function of groups of arguments. `operator` registers it with a flat schema, so
each argument is declared once, and is called with the flat arguments: `fused_loss(*head, *loss)`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from lopd_kernels._core.gemm import compute_dtype
from lopd_kernels._core.linear import Linear, make_linear
from lopd_kernels._core.rules import RowLoss, decode, encode
from lopd_kernels._core.scaling import weigh
from lopd_kernels._core.types import Needs, Skip

NAMESPACE = "lopd"  # of torch.ops; `hub/assemble.py` gives each build its own


class HeadArgs(NamedTuple):
    """The LM head of a call, the gradients that its backward computes, and its workspace."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    temperature: float
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    workspace_bytes: int | None

    @property
    def linear(self) -> Linear:
        return make_linear(*self[:6])

    @property
    def needs(self) -> Needs:
        return Needs(self.need_hidden, self.need_weight, self.need_bias)

    @property
    def rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return compute_dtype(self.hidden.dtype)

    def empty(self, *shape: int) -> Tensor:
        return self.hidden.new_empty(shape, dtype=self.dtype)

    def empty_grads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Complete gradients, as the gradient operators return them; [0] if not needed."""
        return (
            self.hidden.new_empty(self.hidden.shape if self.need_hidden else (0,)),
            self.weight.new_empty(self.weight.shape if self.need_weight else (0,)),
            self.empty(self.weight.shape[0] if self.need_bias else 0),
        )


class LossArgs(NamedTuple):
    """A `RowLoss` with its rule encoded; exact with a dense_share of None and a tolerance of 0."""

    ids: Tensor  # [N, K]
    target: Tensor  # [N, M]
    row_weights: Tensor | None  # [N]
    rule: str
    options: list[float]
    dense_share: float | None
    tolerance: float
    seed: Tensor | None  # []

    @classmethod
    def of(cls, loss: RowLoss) -> "LossArgs":
        share, tolerance, seed = loss.skip or Skip(None, 0.0, None)
        inputs = loss.ids, loss.target, loss.row_weights
        return cls(*inputs, *encode(loss.rule), share, tolerance, seed)

    @property
    def loss(self) -> RowLoss:
        exact = self.dense_share is None and self.tolerance == 0.0
        skip = None if exact else Skip(self.dense_share, self.tolerance, self.seed)
        return RowLoss(*self[:3], decode(self.rule, self.options), skip)

    @property
    def stats_width(self) -> int:
        return self.loss.stats_width


def grads_fake(head: HeadArgs, *_: Any) -> Any:
    """The fake of an operator that returns complete gradients."""
    return head.empty_grads()


def operator(
    name: str, fake: Callable[..., Any], mutates: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Register a function of groups of arguments as `lopd::name`.

    Args:
        fake: the same function under tracing: results of the right shapes, without values.
        mutates: names of the tensors that the operator writes to.
    """

    def register(function: Callable[..., Any]) -> torch.library.CustomOpDef:
        parameters, groups = [], []
        hints = get_type_hints(function)
        for argument, hint in list(hints.items())[:-1]:
            is_group = hasattr(hint, "_fields")
            fields = get_type_hints(hint) if is_group else {argument: hint}
            groups.append((hint if is_group else None, len(fields)))
            parameters += [
                inspect.Parameter(key, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for key, kind in fields.items()
            ]

        def grouped(flat: tuple[Any, ...]) -> list[Any]:
            out, start = [], 0
            for group, size in groups:
                out.append(flat[start] if group is None else group(*flat[start : start + size]))
                start += size
            return out

        def implementation(*flat: Any) -> Any:
            with torch.autocast(flat[0].device.type, enabled=False):
                return function(*grouped(flat))

        signature = inspect.Signature(parameters, return_annotation=hints["return"])
        implementation.__signature__ = signature  # type: ignore[attr-defined]
        definition = torch.library.custom_op(
            f"{NAMESPACE}::{name}", implementation, mutates_args=mutates
        )
        definition.register_fake(lambda *flat: fake(*grouped(flat)))
        return definition

    return register


def check_differentiated_once(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} can be differentiated once, but its backward was called with "
            "create_graph=True; use lopd_kernels.reference for second derivatives"
        )


def save(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: tuple[Tensor, ...],
    values: int = 1,
    store_inputs: bool = True,
) -> None:
    """The setup of a backward: only the first `values` results are differentiable.

    Stores the flat inputs and the results after the first two.
    """
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[values:])
    ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in inputs]
    inputs = inputs if store_inputs else ()
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]


def restore(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    """(flat inputs, results) from `save`."""
    count, saved = len(ctx.constants), ctx.saved_tensors  # read once: hooks unpack at every access
    pairs = zip(saved[:count], ctx.constants, strict=True)
    inputs = [constant if tensor is None else tensor for tensor, constant in pairs]
    return inputs, saved[count:]


def restore_head(ctx: Any) -> tuple[HeadArgs, list[Any], tuple[Tensor, ...]]:
    """(head with the gradients that autograd needs now, other flat inputs, results)."""
    inputs, results = restore(ctx)
    count = len(HeadArgs._fields)
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    head = HeadArgs(*inputs[:count])._replace(
        need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias
    )
    return head, inputs[count:], results


def upstream_args(inputs: list[Any], upstream: Tensor) -> LossArgs:
    """The `LossArgs` at the start of `inputs`, weighted by the upstream gradient as well."""
    args = LossArgs(*inputs[: len(LossArgs._fields)])
    if args.row_weights is not None:
        upstream = weigh(upstream, args.row_weights)
    return args._replace(row_weights=upstream)


def input_grads(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The backward's return value: gradients of the first inputs, None for the others.

    Every gradient is cast to the dtype of its input; one that autograd does not need is dropped.
    """
    needed = zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
    out = [grad.to(dtype) if need and grad is not None else None for grad, dtype, need in needed]
    return (*out, *(None,) * (len(ctx.needs_input_grad) - len(out)))
