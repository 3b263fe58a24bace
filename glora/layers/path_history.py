"""Which path a layer uses when backward runs forward again: the path of the first run.

Activation checkpointing (``torch.utils.checkpoint``, timm's ``set_grad_checkpointing``, transformers'
``gradient_checkpointing_enable``) calls forward a second time in the middle of backward. The autograd node being
evaluated tells which call that repeats: nodes are numbered in the order in which a thread makes them, so the path that
was in force at the node's number is the path of the first run.
"""

from __future__ import annotations

from bisect import bisect_right
from threading import local

import torch

from glora_kernels.torch_private import NO_TASK, graph_task, in_backward, next_node, repeated_node

from ..config import PathConfig

LONGEST = 256
_ADVICE = "keep the paths until backward is done"


class _Thread(local):
    """A token for each thread, which unlike a thread's number is never used again."""

    def __init__(self) -> None:
        self.token = object()


_thread = _Thread()


def next_start() -> int:
    """The number of the first node that can be made under paths that are set now.

    Raises:
        RuntimeError: during a backward pass, where new paths would have no effect.
    """
    if in_backward():
        raise RuntimeError(
            "path: expected to be set outside of backward, where a layer runs again with the path of its first run; "
            "got a new path during a backward pass"
        )
    return next_node()


class PathHistory:
    """The current path of one layer, and those that were in force when the nodes of its thread were made.

    Copies and pickles hold only the current path: nodes refer to the layer that made them.
    """

    def __init__(self, path: PathConfig):
        self.now = path
        self._thread = _thread.token
        self._ran = False
        self._starts, self._paths = [0], [path]
        self._elsewhere: set[PathConfig] = set()

    def __reduce__(self):
        return PathHistory, (self.now,)

    @property
    def since(self) -> int:
        """The number of the first node that can be made under the current path."""
        return self._starts[-1]

    @property
    def has_run(self) -> bool:
        """Whether a forward pass has asked for the path, in any thread, since this was made or copied."""
        return self._ran or bool(self._elsewhere)

    def set(self, path: PathConfig, start: int) -> None:
        """Set the path in force from the node ``start`` on, which is what :func:`next_start` says now."""
        if _thread.token is not self._thread:
            self._enter_thread()
        self.now = path
        last = self._paths[-1]
        if start == self._starts[-1]:  # no node was made since the previous path was set
            self._paths[-1] = path
        elif path is not last and path != last:
            self._starts.append(start)
            self._paths.append(path)
            del self._starts[:-LONGEST], self._paths[:-LONGEST]

    def in_force(self) -> PathConfig:
        """The path to run with: during backward, that of the forward pass that is run again; otherwise the current one.

        Raises:
            RuntimeError: it cannot be told which path that was: after more than ``LONGEST`` changes, or with forward
                passes in several threads.
        """
        if torch.compiler.is_compiling():
            return self.now
        return self.in_force_eagerly()

    def in_force_eagerly(self) -> PathConfig:
        """:meth:`in_force` where it is known that nothing is compiling."""
        if graph_task() != NO_TASK:
            node = repeated_node()
            return self.now if node is None else self._at(node)
        if _thread.token is not self._thread:
            self._enter_thread()
        self._ran = True
        return self.now

    def _enter_thread(self) -> None:
        """Start a history for this thread and remember what has run: node numbers of two threads cannot be compared."""
        if self._ran:
            self._elsewhere.update(self._paths)
        self._thread, self._ran = _thread.token, False
        self._starts, self._paths = [0], [self.now]

    def _at(self, node: int) -> PathConfig:
        place = bisect_right(self._starts, node) - 1
        if place < 0:
            raise RuntimeError(
                f"path: expected at most {LONGEST} changes between a checkpointed forward pass and its backward, got "
                f"more; {_ADVICE}"
            )
        path = self._paths[place]
        if self._elsewhere - {path}:
            raise RuntimeError(
                "path: expected the checkpointed forward passes of a layer in one thread, got several, which does not "
                f"tell the path of each; {_ADVICE}"
            )
        return path
