"""Triton kernels and their launchers: tensors in, tensors out, no autograd.

One file an operation. The files here import torch, triton and, relatively, each other, and nothing
else of this project: checking arguments, choosing a backend and gradients belong to tinyclip.ops.
The folder is installed as tinyclip.triton_kernels, since Triton ships a package of the plain name.
"""
