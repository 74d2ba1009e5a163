"""CUDA graphs: a function's launches recorded once and replayed as one, with what it reads in buffers of its own.

At batch 1 a generation is thousands of kernels of a few microseconds each, and Python takes longer to launch them than
they take to run. A replay launches them all at once.
"""

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mvar.errors import message
from mvar_kernels.precision import settings

MAX_GRAPHS = 4
"""Graphs kept; the one unused for longest goes first. A run that draws one batch size has two, its last batch's being
the other. They share one memory pool, so that another graph costs little more than its outputs."""

WARM_UPS = 2
"""Runs before a capture: the first compiles kernels and fills caches, the second finds the allocator settled."""

BATCHES = (1, 2, 4, 8, 16, 25, 32, 50, 64)
"""Batches of up to 64 images are padded to the next of these: powers of two, so that at most half is wasted, and the
sizes that speed and FID are usually measured at, 25 and 50. Larger ones are as they are: whoever draws so many at once
draws the same number again, and half of it would be seconds."""

Outputs = tuple[Tensor, ...]


class Graph(Protocol):
    """What is needed of a graph: of torch's in :class:`CudaGraph`, and of a stand-in in the tests."""

    def record(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Any) -> Outputs:
        """Run the function on these inputs, and give what it returned: replays read those and write there."""

    def replay(self) -> None: ...

    def pool(self) -> Any:
        """Of the memory that the recording took, for another one's use."""


class CaptureError(RuntimeError):
    """The launches could not be recorded."""


class CudaGraph:
    """torch.cuda.CUDAGraph on one device."""

    _streams: dict[torch.device, torch.cuda.Stream] = {}  # one a device: each costs cuBLAS a workspace of its own

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Any) -> Outputs:
        with torch.cuda.device(self.device):
            stream = self._streams.setdefault(self.device, torch.cuda.Stream(self.device))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # where the capture will be: libraries keep workspaces by stream
                for _ in range(WARM_UPS):
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            try:
                # A capture that fails leaves torch on its stream: the outer context goes back. Other threads may go on
                # using the device meanwhile.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    outputs = function(*inputs)
            except RuntimeError as error:
                cause = error.__context__ or error  # ending a failed capture fails, too, and says nothing of why
                raise CaptureError(message(cause)) from error
        return outputs

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()

    def pool(self) -> Any:
        return self.graph.pool()


class _Recording:
    """A graph, the buffers it reads, and those it writes."""

    def __init__(self, graph: Graph, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Any) -> None:
        self.graph = graph
        self.inputs = [t.clone() for t in inputs]
        self.outputs = graph.record(function, self.inputs, pool)

    def replay(self, inputs: Sequence[Tensor]) -> Outputs:
        for buffer, t in zip(self.inputs, inputs, strict=True):
            buffer.copy_(t)
            if buffer.is_cuda:  # it may be dropped while this replay is under way
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
        self.graph.replay()
        return tuple(t.clone() for t in self.outputs)


class Graphs:
    """Recordings by key, at most `bound` of them. A recording is gone with the first of its owners."""

    def __init__(self, make: Callable[[torch.device], Graph] = CudaGraph, bound: int = MAX_GRAPHS) -> None:
        self.make, self.bound = make, bound
        self._known: OrderedDict[Hashable, tuple[_Recording | str, list[weakref.ref[Any]]]] = OrderedDict()
        self._lock = threading.RLock()  # an owner may be collected, and its recording dropped, while it is held
        self._done: dict[torch.device, torch.cuda.Event] = {}

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Drop all recordings, and with the last one their memory."""
        with self._lock:
            self._known.clear()

    def run(
        self, owners: Sequence[Any], how: Hashable, function: Callable[..., Outputs], inputs: Sequence[Tensor]
    ) -> Outputs:
        """`function(*inputs)` by replay; recorded first where there is no recording for these owners, `how`, and
        inputs of these shapes.

        Args:
            owners: whatever holds the memory, besides the inputs, that the function reads: models.
            how: all else that the function depends on.
            inputs: on one device.

        Raises:
            CaptureError: it cannot be recorded. It is not tried again.
        """
        arithmetic = settings(), torch.is_autocast_enabled()
        key = (*map(id, owners), how, arithmetic, *((t.shape, t.dtype, t.device) for t in inputs))
        # Buffers made in inference mode could not be written to outside of it.
        with self._lock, self._in_order(inputs[0].device), torch.inference_mode(False), torch.no_grad():
            if key not in self._known:
                self._known[key] = self._recorded(function, inputs), [self._watch(owner, key) for owner in owners]
            self._known.move_to_end(key)
            found, _ = self._known[key]
            if isinstance(found, str):
                raise CaptureError(found)
            return found.replay(inputs)

    def _recorded(self, function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> _Recording | str:
        """The recording, or in words why there is none: the error would keep all that the function held alive."""
        while len(self._known) >= self.bound:
            self._known.popitem(last=False)
        device = inputs[0].device
        # A pool is shared with the living only: torch frees it with the last graph in it.
        alive = (r for r, _ in list(self._known.values()) if isinstance(r, _Recording) and r.inputs[0].device == device)
        other = next(alive, None)
        try:
            return _Recording(self.make(device), function, inputs, other and other.graph.pool())
        except CaptureError as error:
            return str(error)

    def _watch(self, owner: Any, key: Hashable) -> "weakref.ref[Any]":
        def drop(_: Any) -> None:
            with self._lock:
                self._known.pop(key, None)

        return weakref.ref(owner, drop)

    @contextmanager
    def _in_order(self, device: torch.device) -> Iterator[None]:
        """Replays share memory: each waits for the one before, whatever stream that was on."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if device in self._done:
            stream.wait_event(self._done[device])
        yield
        self._done[device] = stream.record_event()


def has_graphs(device: torch.device) -> bool:
    """Whether graphs can be recorded there. Batches are padded there, too, with or without a graph."""
    return device.type == "cuda"


def padded_batch(batch: int) -> int:
    """The batch that so many images are drawn in: see :data:`BATCHES`."""
    return next((size for size in BATCHES if size >= batch), batch)


_told: set[str] = set()


def warn_of(error: CaptureError) -> None:
    """Once for each reason."""
    if str(error) not in _told:
        _told.add(str(error))
        warnings.warn(f"drawing without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)
