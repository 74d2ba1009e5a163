"""CUDA graphs: capture the kernel launches of a function once and replay them as one, with static input buffers.

At batch 1 a generation is thousands of kernels of a few microseconds each, and Python takes longer to launch them than
they take to run. A replay launches all of them at once.
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

from mvar.utils.errors import message
from mvar_kernels.precision import settings

MAX_GRAPHS = 4
"""Size of the least recently used cache. A run with a fixed batch size has two graphs, one for its last batch. Graphs
share a memory pool, so that an additional graph takes little more memory than its outputs."""

WARM_UPS = 2
"""Runs before a capture: the first compiles kernels and fills caches, the second runs with a warm allocator."""

BATCHES = (1, 2, 4, 8, 16, 25, 32, 50, 64)
"""Batch sizes for padding batches of up to 64 images: powers of two, so that less than half of a batch is padding, and
25 and 50, at which speed and FID are usually measured. Larger batches are not padded: they usually repeat with the same
size, and padding would take up to seconds."""

Outputs = tuple[Tensor, ...]


class Graph(Protocol):
    """Interface of a graph: :class:`CudaGraph`, or a replacement in tests."""

    def record(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Any) -> Outputs:
        """Capture `function(*inputs)` and return its outputs. Replays read these inputs and write these outputs."""

    def replay(self) -> None: ...

    def pool(self) -> Any:
        """Memory pool of the capture, to share with other graphs."""


class CaptureError(RuntimeError):
    """The function could not be captured."""


class CudaGraph:
    """torch.cuda.CUDAGraph on one device."""

    _streams: dict[torch.device, torch.cuda.Stream] = {}  # one per device: cuBLAS allocates a workspace per stream

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Any) -> Outputs:
        with torch.cuda.device(self.device):
            stream = self._streams.setdefault(self.device, torch.cuda.Stream(self.device))
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # the capture's stream, as libraries keep workspaces per stream
                for _ in range(WARM_UPS):
                    function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            try:
                # The outer context restores the stream after a failed capture. "thread_local" lets other threads use
                # the device meanwhile.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    outputs = function(*inputs)
            except RuntimeError as error:
                cause = error.__context__ or error  # ending a failed capture raises, too, without the cause
                raise CaptureError(message(cause)) from error
        return outputs

    def replay(self) -> None:
        with torch.cuda.device(self.device):
            self.graph.replay()

    def pool(self) -> Any:
        return self.graph.pool()


class _Recording:
    """A graph with its input and output buffers."""

    def __init__(self, graph: Graph, function: Callable[..., Outputs], inputs: Sequence[Tensor], pool: Any) -> None:
        self.graph = graph
        self.inputs = [t.clone() for t in inputs]
        self.outputs = graph.record(function, self.inputs, pool)

    def replay(self, inputs: Sequence[Tensor]) -> Outputs:
        for buffer, t in zip(self.inputs, inputs, strict=True):
            buffer.copy_(t)
            if buffer.is_cuda:  # the buffer may be freed while this replay runs
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
        self.graph.replay()
        return tuple(t.clone() for t in self.outputs)


class Graphs:
    """Least recently used cache of captured graphs. A graph is dropped when one of its owners is garbage-collected.

    Args:
        make: creates a graph on a device.
        max_graphs: size of the cache.
    """

    def __init__(self, make: Callable[[torch.device], Graph] = CudaGraph, max_graphs: int = MAX_GRAPHS) -> None:
        self.make, self.max_graphs = make, max_graphs
        self._entries: OrderedDict[Hashable, tuple[_Recording | str, list[weakref.ref[Any]]]] = OrderedDict()
        self._lock = threading.RLock()  # reentrant: garbage collection may drop a graph while it is held
        self._last_replay: dict[torch.device, torch.cuda.Event] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drop all graphs and free their memory pool."""
        with self._lock:
            self._entries.clear()

    def run(
        self, owners: Sequence[Any], options: Hashable, function: Callable[..., Outputs], inputs: Sequence[Tensor]
    ) -> Outputs:
        """Compute `function(*inputs)` by replaying a graph, captured at the first call with these owners, options and
        input shapes.

        Args:
            owners: models with the weights that the function reads.
            options: everything else that the function depends on.
            function: returns a tuple of tensors.
            inputs: on one device.

        Raises:
            CaptureError: the function cannot be captured. A failed capture is not repeated.
        """
        precision = settings(), torch.is_autocast_enabled()
        key = (*map(id, owners), options, precision, *((t.shape, t.dtype, t.device) for t in inputs))
        # Inference tensors could not be written to outside of inference mode.
        with self._lock, self._serialized(inputs[0].device), torch.inference_mode(False), torch.no_grad():
            if key not in self._entries:
                self._entries[key] = self._capture(function, inputs), [self._drop_with(owner, key) for owner in owners]
            self._entries.move_to_end(key)
            recording, _ = self._entries[key]
            if isinstance(recording, str):
                raise CaptureError(recording)
            return recording.replay(inputs)

    def _capture(self, function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> _Recording | str:
        """Capture a graph. Returns the message of a failure: the exception would keep the function's tensors alive."""
        while len(self._entries) >= self.max_graphs:
            self._entries.popitem(last=False)
        device = inputs[0].device
        # Share the pool of an existing graph: torch frees a pool with its last graph.
        recordings = [r for r, _ in list(self._entries.values()) if isinstance(r, _Recording)]
        other = next((r for r in recordings if r.inputs[0].device == device), None)
        try:
            return _Recording(self.make(device), function, inputs, other and other.graph.pool())
        except CaptureError as error:
            return str(error)

    def _drop_with(self, owner: Any, key: Hashable) -> "weakref.ref[Any]":
        def drop(_: Any) -> None:
            with self._lock:
                self._entries.pop(key, None)

        return weakref.ref(owner, drop)

    @contextmanager
    def _serialized(self, device: torch.device) -> Iterator[None]:
        """Let a replay wait for the previous one on any stream, as graphs share memory."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.current_stream(device)
        if device in self._last_replay:
            stream.wait_event(self._last_replay[device])
        yield
        self._last_replay[device] = stream.record_event()


def has_graphs(device: torch.device) -> bool:
    """Whether the device supports graphs. If so, batches are padded, with or without a graph."""
    return device.type == "cuda"


def padded_batch(batch: int) -> int:
    """Batch size after padding: see :data:`BATCHES`."""
    return next((size for size in BATCHES if size >= batch), batch)


_warned: set[str] = set()


def warn_once(error: CaptureError) -> None:
    """Warn that no graph is used, once per reason."""
    if str(error) not in _warned:
        _warned.add(str(error))
        warnings.warn(f"generating without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)
