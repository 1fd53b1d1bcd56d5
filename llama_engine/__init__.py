"""Llama inference from an INT8 weight-only checkpoint: a native paged-attention engine and honest measurement."""

__version__ = "0.2.0"
