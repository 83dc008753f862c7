"""Triton kernels; nothing here is imported before a tensor needs it."""
