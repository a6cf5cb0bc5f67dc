"""Activations that leave the GPU between the forward and the backward pass, by the rules of TRL's OffloadActivations.

For steps that are computed without memory: what has left is forgotten, and comes back as another tensor of its shape.
"""

from collections import OrderedDict
from typing import Any

SMALL = 1024  # bytes, below which a tensor stays
STASH = 5  # tensors that are still on the GPU while they are copied


def offloaded(model: Any) -> Any:
    """A context in which saved tensors leave the GPU, without the weights of the model.

    A tensor that is saved again while its first copy is under way stays, as in TRL.
    """
    import torch

    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    under_way: OrderedDict[int, Any] = OrderedDict()

    def pack(tensor: Any) -> Any:
        key = tensor.untyped_storage()._cdata
        small = tensor.numel() * tensor.element_size() < SMALL
        if small or key in weights or key in under_way or not tensor.is_floating_point():
            return tensor
        under_way[key] = tensor
        while len(under_way) > STASH:
            under_way.popitem(last=False)
        return tensor.shape, tensor.dtype

    def unpack(packed: Any) -> Any:
        if isinstance(packed, torch.Tensor):
            return packed
        under_way.clear()
        return torch.empty(packed[0], dtype=packed[1])

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
