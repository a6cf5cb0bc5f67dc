"""The devices of this machine."""

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def has_bf16() -> bool:
    """Is there a GPU that computes in bfloat16 itself (Ampere and newer)?"""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))


def has_gpu() -> bool:
    """Is there an NVIDIA driver? Asked without torch, which would open the GPU."""
    return shutil.which("nvidia-smi") is not None
