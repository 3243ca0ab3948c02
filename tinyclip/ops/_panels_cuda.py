"""The `cuda` backend of the contrastive passes: the extension's kernels, walked panel by panel."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyclip import _extension
from tinyclip.ops import _panels

_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Kernels:
    one_dtype = True

    @staticmethod
    def tile(kind: str, dtype: torch.dtype, teacher: bool) -> tuple[int, int]:
        return _extension.load().contrastive_cuda_tile(teacher)

    @staticmethod
    def features(x: Tensor) -> Tensor:
        """Rows of whole 16 bytes at 16-byte addresses, with zeros where there was nothing."""
        step = 16 // x.itemsize
        if x.shape[1] % step:
            return F.pad(x, (0, -x.shape[1] % step))
        rows_apart = x.stride(0)
        if x.data_ptr() % 16 or rows_apart % step or rows_apart < x.shape[1] or x.stride(1) != 1:
            return x.clone(memory_format=torch.contiguous_format)
        return x

    @staticmethod
    def stats(panel, rows, cols, positive, parts, first) -> None:
        _extension.load().contrastive_cuda_stats(
            *_panel(panel),
            *(_strided(parts.rows, 2), _strided(parts.cols, 2)),
            *(_strided(rows), _strided(cols), positive.data_ptr(), first, _launch(panel.a)),
        )

    @staticmethod
    def grads(panel, rows, cols, weights, alpha, ds, dscale) -> None:
        _extension.load().contrastive_cuda_grads(
            *_panel(panel),
            *(float(alpha), _strided(rows), _strided(cols)),
            *(weights[0].data_ptr(), weights[1].data_ptr()),
            *(_strided(ds), dscale.data_ptr(), _launch(panel.a)),
        )


def _panel(panel) -> tuple:
    """Dtype, shape, features, scale and teacher, as the extension takes them."""
    a, b, scale, ta, tb, t_scale, diagonal = panel
    teacher = None if ta is None else (_features(ta), _features(tb), t_scale.data_ptr())
    shape = (a.shape[0], b.shape[0], diagonal)
    return _dtype(a), shape, _features(a), _features(b), scale.data_ptr(), teacher


def _dtype(x: Tensor) -> str:
    """fp32 products are whole, in three of TF32's, unless torch was told otherwise."""
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tfloat32"
    return _NAMES.get(x.dtype, "float32")


def _features(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), x.stride(0), x.shape[1]


def _strided(x: Tensor, dim: int = 0) -> tuple[int, int]:
    """Address and stride; of parts (tiles, numbers, length), the length."""
    return x.data_ptr(), x.shape[2] if dim == 2 else x.stride(0)


def _launch(x: Tensor) -> tuple[int, int]:
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


contrastive_stats = partial(_panels.contrastive_stats, Kernels)
contrastive_grads = partial(_panels.contrastive_grads, Kernels)
