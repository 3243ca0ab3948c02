"""Triton kernels and their launchers: tensors in, tensors out, no autograd.

`attention_fwd.py`, `attention_bwd.py`, `gelu_mlp.py` (with `gelu_mlp_fused.py`,
`gelu_mlp_pointwise.py` and `activations.py`), `layer_norm.py` and `contrastive.py` hold the kernels
and their launchers; `tiling.py` cuts a length into tiles, `tuning.py` takes their size from
`tables/`, `launch.py` is a launch as a value.

The files import torch, triton and, relatively, each other, and nothing else of this project:
checking arguments, choosing a backend and gradients belong to tinyclip.ops. The folder is installed
as tinyclip.triton_kernels, since Triton ships a package of the plain name.
"""
