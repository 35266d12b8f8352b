"""Layers of a diffusers UNet as fused Triton kernels, for training and for sampling."""

from .modules import fuse_layers

__all__ = ["fuse_layers"]
