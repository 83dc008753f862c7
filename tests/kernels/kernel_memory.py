"""What the operators allocate, and which GEMMs they run."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopd_kernels._ops import logits, logprobs, losses

OPERATORS = (losses, logprobs, logits)
GEMMS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators allocate in this context, and GEMMs by output shape.

    The mode enters this library's operators, which are one opaque call each to other modes.
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0
        self.gemms = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lopd":
            name = func.overloadpacket.__name__
            with self:
                operator = next(getattr(m, name) for m in OPERATORS if hasattr(m, name))
                return operator._init_fn(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in inputs and key not in self.live:
                continue
            if key not in self.live and storage.nbytes():
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
            self.largest = max(self.largest, storage.nbytes())
            if func.overloadpacket in GEMMS:
                self.gemms.append(tuple(tensor.shape))
        self.peak = max(self.peak, sum(self.live.values()))
        return out
