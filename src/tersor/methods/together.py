"""One training on several processes: each takes a slice of every batch, and together they make the step of one.

What depends on the whole batch is computed over all slices: gradients and the loss (their sum), statistics of batch
normalisation (Ioffe 2015; forward and backward), and the noise of dropout, drawn for the whole batch from the
step's seed, of which each takes its rows. What is left is the order of float32 sums.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tersor.errors import RunError, SpecError
from tersor.runs.processes import Processes, processes


class Together:
    """The slice of this process in a batch of `batch_size` images, and what is exchanged about it.

    Every method raises LostProcessError where another process is lost. Raises SpecError for a batch that has not
    an image for each process.
    """

    def __init__(self, batch_size: int, among: Processes | None = None) -> None:
        self.processes = among or processes()
        rank, count = self.processes.rank, self.processes.count
        if batch_size < count:
            raise SpecError(
                f"a batch of {batch_size} images over {count} processes leaves some without any; raise batch_size"
            )
        self.batch_size = batch_size
        self.part = slice(batch_size * rank // count, batch_size * (rank + 1) // count)
        self.share = (self.part.stop - self.part.start) / batch_size

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raise RunError naming the first of `facts` (what -> its digest) that differs between processes."""
        held = self.processes.gathered(dict(facts))
        for what in facts:
            for rank, other in enumerate(held):
                if other.get(what) != held[0][what]:
                    raise RunError(
                        f"process {rank} of {len(held)} was given another {what} than process 0; all start from "
                        "the same seed, weights, data and version"
                    )

    def all_can(self, able: bool) -> bool:
        """Whether every process is able."""
        return all(self.processes.gathered(able))

    @contextlib.contextmanager
    def whole_batch(self) -> Any:
        """A forward pass whose batch norms and dropout see the whole batch."""
        if self.processes.alone:
            yield
        else:
            with _Statistics(self.processes), _Noise(self.part, self.batch_size):
                yield

    def exchange_(
        self, parameters: Iterable[nn.Parameter], loss: torch.Tensor, stop: bool
    ) -> tuple[torch.Tensor, bool]:
        """Add up gradients, in place, and loss over all processes; and whether one of them is to stop."""
        if self.processes.alone:
            return loss, stop
        moved = [p for p in parameters if p.requires_grad]
        wide = any(p.dtype == torch.float64 for p in moved)
        dtype = torch.float64 if wide else torch.float32
        last = [0.0 if p.grad is None else 1.0 for p in moved]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        told = torch.tensor([*last, float(stop)], dtype=dtype, device=loss.device)
        flat = [part.flatten().to(dtype) for part in parts]
        whole = self.processes.sum_(torch.cat([*flat, told, loss.detach().to(dtype).view(1)]))
        sums: Any = torch.split(whole, [part.numel() for part in parts] + [len(last), 1, 1])
        for parameter, total, has in zip(moved, sums, sums[-3].tolist(), strict=False):
            if has:
                grad = total.view(parameter.shape).to(parameter.dtype)
                parameter.grad = torch.empty_like(parameter).copy_(grad)  # in its memory format
        return sums[-1].view(()).to(loss.dtype), bool(sums[-2])


def digest(module: nn.Module | None) -> str:
    """SHA-256 of a network's state: names, shapes and values."""
    return digest_of({} if module is None else module.state_dict())


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: names, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            held = tensor.detach().cpu().contiguous()
            found.update(repr((name, tuple(held.shape), str(held.dtype))).encode())
            found.update(held.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class _Statistics(TorchFunctionMode):
    """Batch normalisation in training normalises with mean and variance of the whole batch."""

    def __init__(self, among: Processes) -> None:
        super().__init__()
        self.among = among

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.batch_norm:
            return self._batch_norm(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        func: Any,
        inputs: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        if not training:
            return func(inputs, running_mean, running_var, weight, bias, training, momentum, eps)  # type: ignore[no-any-return]
        output, mean, var, count = _Normalise.apply(inputs, eps, self.among)
        shape = (1, -1, *(1,) * (inputs.ndim - 2))
        if weight is not None:
            output = output * weight.view(shape)
        if bias is not None:
            output = output + bias.view(shape)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean), momentum)
            if running_var is not None:
                unbiased = var * (count / (count - 1).clamp_min(1))
                running_var.lerp_(unbiased.to(running_var), momentum)
        found: torch.Tensor = output.to(inputs.dtype)
        return found


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps), by channel over the images of all processes; mean, variance, number of values.

    In two passes, mean before variance: the difference of large squares would lose the variance.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, eps: float, among: Processes) -> Any:
        values = inputs if inputs.dtype == torch.float64 else inputs.float()
        dims = (0, *range(2, values.ndim))
        shape = (1, -1, *(1,) * (values.ndim - 2))
        own = values.new_tensor([values.numel() / values.shape[1]])
        sums = among.sum_(torch.cat([values.sum(dims), own]))
        count, mean = sums[-1], sums[:-1] / sums[-1]
        centred = values - mean.view(shape)
        var = among.sum_(centred.square().sum(dims)) / count
        inverse = (var + eps).rsqrt()
        output = centred.mul_(inverse.view(shape))
        ctx.save_for_backward(output, inverse, count)
        ctx.among, ctx.dims, ctx.shape, ctx.dtype = among, dims, shape, inputs.dtype
        ctx.mark_non_differentiable(mean, var, count)
        return output, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        output, inverse, count = ctx.saved_tensors
        shape, dims = ctx.shape, ctx.dims
        means = torch.stack([gradient.sum(dims), (gradient * output).sum(dims)])
        of_mean, of_var = ctx.among.sum_(means) / count
        passed = gradient - of_mean.view(shape) - output * of_var.view(shape)
        return (passed * inverse.view(shape)).to(ctx.dtype), None, None


class _Noise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random zeros and ones with a row (or several) an image are drawn for the whole batch: each process takes its
    rows. That is dropout of every kind, and stochastic depth."""

    def __init__(self, part: slice, batch_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part, self.batch_size = part, batch_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float:
            own, images = args[0], self.part.stop - self.part.start
            rows, rest = divmod(len(own), images) if own.ndim else (0, 1)
            if rows and not rest:
                whole = _like(own, rows * self.batch_size)
                func(whole, *args[1:], **(kwargs or {}))
                return own.copy_(whole[rows * self.part.start : rows * self.part.stop])
        return func(*args, **(kwargs or {}))


def _like(own: torch.Tensor, rows: int) -> torch.Tensor:
    """An empty tensor of `rows` rows in the memory format of `own`: numbers are drawn in the order of memory."""
    form = torch.contiguous_format
    if own.ndim == 4 and not own.is_contiguous():
        form = torch.channels_last
    return own.new_empty((rows, *own.shape[1:])).contiguous(memory_format=form)
