"""bf16 matrix products on CPUs that have no instructions for them. Used by both engines.

There torch falls back to loops that are 40 times slower than float32. Taking the same bf16 numbers
through float32 products and rounding the result to bf16 is what the missing instructions would do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.convolution.default,
        _aten.convolution_backward.default,
    }
)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


class Float32Products(TorchDispatchMode):
    """Within it, products of bf16 tensors on the CPU are computed in float32 and rounded to bf16.

    Works below autograd, so that the products of a backward within it are meant as well.
    """

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not _is_bf16(args):
            return func(*args, **kwargs)
        wide = func(*tree_map_only(torch.Tensor, _widen, args), **tree_map_only(torch.Tensor, _widen, kwargs))
        return tree_map_only(torch.Tensor, _narrow, wide)


def _is_bf16(args: tuple[Any, ...]) -> bool:
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    return bool(tensors) and all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)


def bf16_products(device: torch.device, *, enabled: bool) -> AbstractContextManager[Any]:
    """The context to compute in: Float32Products where bf16 is wanted and the CPU is without, else nothing."""
    if enabled and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return Float32Products()
    return nullcontext()
