"""The fused paths as Triton kernels, for NVIDIA GPUs from compute capability 8.0 on.

`launch` is the door: plain functions of tensors. Nothing outside this package imports triton, and
importing this package alone does not either.
"""
