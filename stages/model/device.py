"""The devices of this machine."""

import gc
import shutil


def has_bf16() -> bool:
    """Whether there is a GPU that computes in bfloat16 without emulation (Ampere and newer)."""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))


def has_gpu() -> bool:
    """Whether there is an NVIDIA driver, found without torch, which would open the GPU."""
    return shutil.which("nvidia-smi") is not None


def torch_device() -> str:
    """The device that models compute on: `cuda` if torch sees a GPU, or else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype() -> str:
    """The dtype that models compute in, whatever they are stored in: bfloat16 if the GPU has it, or else float32."""
    return "bfloat16" if has_bf16() else "float32"


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more, so that the next model has it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
