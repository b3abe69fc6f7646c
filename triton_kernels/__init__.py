"""Triton kernels, one file a family; packaged as ``picnn_fast.triton_kernels``."""
