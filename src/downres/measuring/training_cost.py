"""What one training step costs: MACs and peak memory of forward pass, backward pass and optimizer."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..copying import copied, refuse_sealed, unwrapped
from ..errors import DownresError, first_line
from ..macs import does_arithmetic, macs_of, op_name
from ..probe import batched, channels_of, given, materialised
from ..records import TrainingCost
from .cost import LiveStorages, held_bytes, tensors_in

OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}
CONVENTION = (
    "Of a training step on so many images: forward and backward pass of the mean of all outputs, in float32 and train mode, "
    "every parameter trained; MACs as for a forward pass (the backward pass of a matrix product or a convolution is two of "
    "them, that of fused attention five products). Peak memory: parameters, buffers, gradients, what the optimizer keeps, what "
    "the backward pass needs of the forward pass, and the input, at the most while a second step runs (in the first there is "
    "no state of the optimizer); not the workspace of kernels. Networks that checkpoint, and autocast, take less."
)
"""What the numbers of `measure_training_cost` mean, to be printed beside them."""


def measure_training_cost(
    model: nn.Module, input_size: tuple[int, ...] | None = None, *, optimizer: str = "adamw"
) -> TrainingCost:
    """Exact counts for one training step; see CONVENTION. The model is not touched and nothing is computed.

    input_size: (batch, channels, height, width), without the batch of one image. optimizer: 'adamw' or 'sgd' (momentum 0.9).
    Raises DownresError for another optimizer, and for a network that cannot be trained at this size.
    """
    refuse_sealed(model)
    if optimizer not in OPTIMIZERS:
        raise DownresError(f"The optimizer is one of {', '.join(OPTIMIZERS)}, {optimizer!r} is not.")
    size = batched(input_size or (channels_of(unwrapped(model)), 224, 224))
    model = materialised(unwrapped(model), size)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with FakeCopyMode(fakes):
            network = copied(model).train()
        with fakes:
            return _two_steps(network, size, optimizer)
    except DownresError:
        raise
    except Exception as error:  # whatever a network that was only meant to answer fails with
        other = "a batch of 2 images" if size[0] == 1 else "another size"  # BatchNorm has no statistics of one
        raise DownresError(
            f"{type(model).__name__} cannot be trained at {'x'.join(map(str, size))} ({first_line(error)[:200]}): give "
            f"{other}, or count its forward pass alone."
        ) from error


def _two_steps(network: nn.Module, size: tuple[int, ...], optimizer: str) -> TrainingCost:
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise DownresError(f"{type(network).__name__} has no parameters to train: count its forward pass alone.")
    x = torch.empty(size, dtype=trained[0].dtype)
    steps = OPTIMIZERS[optimizer](trained)
    with _Observer(x) as seen:
        for _ in range(2):
            seen.macs = 0
            seen.uncounted.clear()
            steps.zero_grad(set_to_none=True)
            arguments, named = given(network, x)
            outputs = [y for y in tree_leaves(network(*arguments, **named)) if isinstance(y, Tensor) and y.requires_grad]
            if not outputs:
                raise DownresError(
                    f"What {type(network).__name__} returns does not depend on its parameters: it is not trained."
                )
            sum(y.mean() for y in outputs).backward()  # type: ignore[union-attr]
            del outputs
            seen.counting = False  # an optimizer's elementwise arithmetic is no multiply-accumulate of the network
            steps.step()
            seen.counting = True
    own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*network.parameters(), *network.buffers())}
    state = [t for one in steps.state.values() for t in one.values() if isinstance(t, Tensor)]
    return TrainingCost(
        macs=seen.macs,
        peak_bytes=sum(own.values()) + x.numel() * x.element_size() + seen.live.made_peak,
        param_bytes=sum(p.numel() * p.element_size() for p in network.parameters()),
        gradient_bytes=sum(p.numel() * p.element_size() for p in trained),
        optimizer_bytes=sum(t.numel() * t.element_size() for t in state),
        optimizer=optimizer,
        input_size=size,
        uncounted=dict(sorted(seen.uncounted.items())),
    )


class _Observer(TorchDispatchMode):
    """Sees every operator of forward pass, backward pass and optimizer."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.macs, self.counting = 0, True
        self.uncounted: Counter[str] = Counter()
        self.live = LiveStorages(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.live.before(tensors_in((*args, *kwargs.values())))
        out = func(*args, **kwargs)
        self.live.after(tensors_in((out,)), held_bytes(op_name(func), args, out))
        if func.namespace != "aten" or not self.counting:
            return out
        if (macs := macs_of(func, args, kwargs, out)) is not None:
            self.macs += macs
        elif does_arithmetic(func):
            self.uncounted[op_name(func)] += 1
        return out
