"""The paths of a layer over time: a forward pass that is run again during backward takes the path of its first run.

Activation checkpointing (``torch.utils.checkpoint``, timm's ``set_grad_checkpointing``, transformers'
``gradient_checkpointing_enable``) calls forward a second time in the middle of backward. Which call that repeats is
told by the autograd node being evaluated: nodes are numbered in the order in which a thread makes them, and so the
path that was in force at the node's number is the path of the first run.
"""

from __future__ import annotations

from bisect import bisect_right
from threading import current_thread

import torch
from torch.utils.checkpoint import CheckpointFunction

from .config import PathConfig

LONGEST = 256
_ADVICE = "keep the paths until backward is done"
_REENTRANT = CheckpointFunction._backward_cls  # type: ignore[attr-defined]


class PathHistory:
    """The path of one layer now, and those that were in force when the nodes of its thread were made.

    Copies and pickles hold the path of now alone: nodes refer to the layer that made them.
    """

    def __init__(self, path: PathConfig):
        self.now = path
        self._thread = current_thread()
        self._ran = False
        self._starts, self._paths = [0], [path]
        self._elsewhere: set[PathConfig] = set()

    def __reduce__(self):
        return PathHistory, (self.now,)

    @property
    def since(self) -> int:
        """The number of the first node that can be made under the path of now."""
        return self._starts[-1]

    def set(self, path: PathConfig) -> None:
        """Raises RuntimeError during a backward pass, where it would have no effect."""
        if _in_backward():
            raise RuntimeError(
                "path: expected to be set outside of backward, where a layer runs again with the path of its first "
                "run; got a new path during a backward pass"
            )
        self._enter_thread()
        self.now = path
        start = torch._C._autograd._get_sequence_nr()
        if start == self._starts[-1]:  # no node was made since the previous path was set
            self._paths[-1] = path
        elif path != self._paths[-1]:
            self._starts.append(start)
            self._paths.append(path)
            del self._starts[:-LONGEST], self._paths[:-LONGEST]

    def in_force(self) -> PathConfig:
        """The path to run with: during backward that of the forward pass that is run again, otherwise that of now.

        Raises:
            RuntimeError: it cannot be told which path that was. Only where paths have changed since: after more than
                ``LONGEST`` changes, with forward passes in several threads, or inside nested checkpoints one of which
                is reentrant.
        """
        if torch.compiler.is_compiling():
            return self.now
        if _in_backward():
            node = torch._C._current_autograd_node()
            return self.now if node is None else self._at(node)  # None: in a callback at the end of backward
        self._enter_thread()
        self._ran = True
        return self.now

    def _enter_thread(self) -> None:
        """Numbers of two threads cannot be compared: a change of thread starts anew, and remembers what has run."""
        thread = current_thread()
        if thread is not self._thread:
            if self._ran:
                self._elsewhere.update(self._paths)
            self._thread, self._ran = thread, False
            self._starts, self._paths = [0], [self.now]

    def _at(self, node) -> PathConfig:
        place = bisect_right(self._starts, node._sequence_nr()) - 1
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
        if path != self.now and _makes_nested_nodes(node):
            raise RuntimeError(
                "path: expected nested checkpoints with use_reentrant=False each, got a reentrant one, and paths that "
                f"changed after the forward pass; {_ADVICE}"
            )
        return path


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _makes_nested_nodes(node) -> bool:
    """Whether this run, itself a repetition, is the first of an inner checkpoint, whose nodes have numbers of today."""
    if not torch.is_grad_enabled():
        return True
    return isinstance(node, _REENTRANT) and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
