"""The bytes of all tensors that are alive, by cause, while a trainer trains, and what they were at the peak.

Tensors are counted by storage: views of one storage count once. Memory that a kernel takes and gives back within one
operation is not seen.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from stages.training.bitsandbytes_ops import held_inside, scales

if TYPE_CHECKING:
    from torch import Tensor, UntypedStorage

CAUSES = ("weights", "gradients", "optimizer", "activations", "logits", "reference", "workspace")


class Ledger:
    """Live bytes by cause, and their values at the moment when the sum was largest."""

    def __init__(self, block: int = 1) -> None:
        self.block = block
        """Each storage is rounded up to a multiple of it, in bytes: 512 for CUDA's allocator."""
        self.live: dict[str, float] = dict.fromkeys(CAUSES, 0)
        self.peak = dict(self.live)
        self.shares: Mapping[str, float] = {}
        """Cause → the share of its bytes that counts; 1 for other causes. Set it before anything is counted."""
        self.cause: str | None = None
        """The cause of new tensors; None: activations where gradients are recorded, workspace elsewhere."""
        self.head: tuple[int, ...] = ()
        """The shape of the weight of the head: what has it in the backward pass of the head is a gradient."""
        self._held: dict[int, tuple[weakref.ref[UntypedStorage], int, str]] = {}

    @property
    def total(self) -> float:
        """Live bytes that count."""
        return sum(self.live.values())

    def add(self, tensor: "Tensor", cause: str) -> None:
        """Count the storage of a tensor, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._held[key] = weakref.ref(storage, partial(self._remove, key)), size, cause
        self._change(cause, size)

    def hold(self, size: int) -> None:
        """Count bytes of workspace that are given back at once."""
        self._change("workspace", size)
        self._change("workspace", -size)

    def move(self, tensor: "Tensor", cause: str) -> None:
        """Count the storage of a tensor under another cause from now on."""
        key = tensor.untyped_storage()._cdata
        if key not in self._held:
            self.add(tensor, cause)
            return
        reference, size, before = self._held[key]
        self._held[key] = reference, size, cause
        self._change(before, -size)
        self._change(cause, size)

    def cause_of(self, tensor: "Tensor") -> str | None:
        """What the storage of a tensor is counted under."""
        held = self._held.get(tensor.untyped_storage()._cdata)
        return held and held[2]

    def begin(self) -> None:
        """Forget the peak: from now on it is the largest sum since this call."""
        self.peak = dict(self.live)

    @contextlib.contextmanager
    def new_are(self, cause: str | None) -> Iterator[None]:
        """Give new tensors a cause."""
        before, self.cause = self.cause, cause
        try:
            yield
        finally:
            self.cause = before

    def _remove(self, key: int, _: Any) -> None:
        _, size, cause = self._held.pop(key)
        self._change(cause, -size)

    def _change(self, cause: str, size: int) -> None:
        self.live[cause] += size * self.shares.get(cause, 1)
        if size > 0 and self.total > sum(self.peak.values()):
            self.peak = dict(self.live)


def follow(ledger: Ledger, seen: Callable[[Any, Any, Any, Any], None] | None = None) -> Any:
    """A context in which the tensors that torch makes go into a ledger.

    `seen(operation, arguments, named arguments, result)` is called for each operation.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    copy = torch.ops.aten._to_copy.default

    class Follow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            cause = ledger.cause or ("activations" if torch.is_grad_enabled() else "workspace")
            ledger.hold(held_inside(func, args))
            if func is copy and ledger.cause_of(args[0]) in ("weights", "reference"):
                cause = "workspace"  # a copy of a weight in another dtype
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    whole = cause == "logits" and tuple(leaf.shape) == ledger.head
                    ledger.add(leaf, "gradients" if whole else cause)
            if seen is not None:
                seen(func, args, kwargs or {}, result)
            return result

    return Follow()


def callback(ledger: Ledger, trainer: Any, *, ahead: bool, step: int = 0, foreach: bool = False) -> Any:
    """A callback of transformers that gives the tensors of a trainer their causes.

    `ahead`: the optimizer makes its state before the first step, which is then like any later one. `step`: bytes that
    are taken besides while the optimizer steps. `foreach`: the optimizer updates all weights at once, as on a GPU.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"]
            optimizer = getattr(optimizer, "optimizer", optimizer)
            _name_weights(ledger, trainer)
            _name_state(ledger, optimizer, step)
            for group in optimizer.param_groups if foreach else ():
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
            if ahead:
                _make_state(optimizer)
            ledger.begin()

    return Callback()


def _name_weights(ledger: Ledger, trainer: Any) -> None:
    """Count weights and buffers of the model and of the reference, and gradients as soon as they are whole."""
    for cause, model in (("weights", trainer.model), ("reference", getattr(trainer, "ref_model", None))):
        for tensor in [] if model is None else [*model.parameters(), *model.buffers(), *scales(model)]:
            if ledger.cause_of(tensor) != "weights":  # a reference can share weights
                ledger.move(tensor, cause)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda weight: ledger.move(weight.grad, "gradients"))


def _name_state(ledger: Ledger, optimizer: Any, step: int) -> None:
    """Count as the optimizer's what its first step makes; later steps make temporary tensors."""
    import torch

    def before(*_: Any) -> None:
        ledger.hold(step)
        ledger.cause = "workspace" if optimizer.state else "optimizer"

    def after(*_: Any) -> None:
        ledger.cause = None
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    ledger.move(value, "optimizer")

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _make_state(optimizer: Any) -> None:
    """Let an optimizer step once with gradients of 0, and forget them."""
    import torch

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def head_apart(ledger: Ledger) -> Iterator[None]:
    """Count what the head of the loss makes as logits, forward and backward."""
    from trl.trainer import utils

    from stages.training import loss_head

    real, scores = utils._ChunkedLogProbFunction, loss_head.scores

    class Head:
        """Takes the place of TRL's autograd function."""

        apply = staticmethod(partial(_apart, ledger, real.apply))

    utils._ChunkedLogProbFunction = Head
    loss_head.scores = partial(_apart, ledger, scores)
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, loss_head.scores = real, scores


def _apart(ledger: Ledger, head: Callable[..., Any], hidden: "Tensor", weight: "Tensor", *args: Any) -> Any:
    """The result of a head for hidden states, (tokens, hidden size), whose tensors count as logits."""

    def begin(gradient: "Tensor") -> None:
        ledger.cause = "logits"

    def end(gradient: "Tensor") -> None:
        ledger.cause = None

    ledger.head = tuple(weight.shape)
    with ledger.new_are("logits"):
        if hidden.requires_grad:
            hidden.register_hook(end)
        result = head(hidden, weight, *args)
        if result[0] is not None and result[0].requires_grad:
            result[0].register_hook(begin)
        return result
