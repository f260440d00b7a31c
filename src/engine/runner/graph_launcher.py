"""Capture a CUDA graph, and launch it without giving up the GIL.

torch's own `CUDAGraph.replay` releases the GIL around the launch. With one busy Python thread in
the process, getting it back takes up to the interpreter's switch interval of 5 ms, and a decode
step takes less than one. `ctypes.PyDLL` calls the driver with the GIL held: 4-9 µs for a graph of
some hundred kernels, because a launch only queues it (measured on an H100; the idea of launching
`raw_cuda_graph_exec` through the driver needs torch >= 2.11).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch


class GraphLauncher:
    """Captures and launches graphs on one stream. Engine thread only.

    Never launch so many that the driver's queue is full: a launch that blocks would hold the GIL.

    Args:
        stream: The engine's own stream; current whenever `capture` is called.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        driver = ctypes.PyDLL("libcuda.so.1")
        self._launch = driver.cuGraphLaunch
        self._launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._launch.restype = ctypes.c_int
        self._stream_handle = ctypes.c_void_p(stream.cuda_stream)

    def capture(self, work: Callable[[], Any]) -> CapturedGraph:
        """Record what `work` launches. Run it once before: kernels must be compiled by then.

        All graphs share one memory pool, so only one of them may run at a time: their stream sees
        to that.
        """
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # thread_local: other threads of the application may use CUDA meanwhile. Not through
        # torch.cuda.graph, which synchronises, collects garbage and empties the cache each time.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
        graph.instantiate()
        return CapturedGraph(graph, ctypes.c_void_p(graph.raw_cuda_graph_exec()))

    def launch(self, graph: CapturedGraph) -> None:
        """Queue a graph on the stream.

        Raises:
            RuntimeError: The driver refused; with its error number.
        """
        status = self._launch(graph.executable, self._stream_handle)
        if status != 0:
            msg = f"cuGraphLaunch failed with CUDA driver error {status}"
            raise RuntimeError(msg)


class CapturedGraph:
    """A graph and its executable form's handle, which lives as long as the graph does."""

    __slots__ = ("executable", "graph")

    def __init__(self, graph: torch.cuda.CUDAGraph, executable: ctypes.c_void_p) -> None:
        self.graph = graph
        self.executable = executable
