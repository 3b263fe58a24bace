"""The verdict on a round trip: the same outputs, a refusal, a warning by name, or a difference without a word.

==========  =======================================================================================
same        the same outputs
refused     before anything was written, with a message that names the argument
late        refused when others read it, by an error that lists names: loud, but after writing
warned      a difference, and a UserWarning that names what is lost, or the paths
SILENT      a difference, and no such warning
UNREADABLE  we wrote a file that we ourselves refuse to read for the same model
ERROR       any other exception; files left by a refusal; a model changed by writing
==========  =======================================================================================
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SAME, REFUSED, LATE, WARNED = "same", "refused", "late", "warned"
SILENT, UNREADABLE, ERROR = "SILENT", "UNREADABLE", "ERROR"
FAILURES = (SILENT, UNREADABLE, ERROR)
PACKAGES = [Path(__file__).resolve().parents[1] / name for name in ("glora", "glora_kernels")]
# How strict readers of other packages report what is missing: they list names, or shared tensors.
OTHERS_REFUSE = re.compile(
    r"Error\(s\) in loading state_dict|ignore_mismatched_sizes|Some tensors share memory|"
    r"Serialization of parametrized modules"
)
# How our messages start: with an argument, a file or a layer.
OPENING = re.compile(r"^(layer '[^']*'|[^\s:]+): \S")


class Verdict(NamedTuple):
    """One of the kinds above, with the message, or the difference relative to the largest output."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.detail}" if self.kind in FAILURES else self.kind


class Looking(NamedTuple):
    """A function of a model: every floating tensor that it returns for ``inputs``; warnings are ignored."""

    inputs: Mapping[str, Any]

    def __call__(self, model: nn.Module) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return outputs(model, self.inputs)


class Way(NamedTuple):
    """A way to save and to load.

    ``write(model, folder)`` writes files, and returns the model that must come back if it is another one.
    ``read(fresh, folder)`` returns a model; it may load into a base, which ``fresh()`` makes. Outputs may differ by
    ``tolerance``, relative to the largest output.
    """

    write: Callable[[nn.Module, Path], object]
    read: Callable[[Callable[[], nn.Module], Path], nn.Module]
    tolerance: float = 0.0


def judge(
    way: Way, model: nn.Module, fresh: Callable[[], nn.Module], folder: Path, look: Looking, warned: str = ""
) -> Verdict:
    """Send ``model`` through ``way``; compare the outputs that ``look`` sees before with those of the loaded model.

    ``warned`` is an earlier warning.
    """
    folder.mkdir()
    expected, names = look(model), names_of(model)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            sent = way.write(model, folder)
        except Exception as error:
            return refused_to_write(error, folder)
        try:
            again = way.read(fresh, folder)
        except Exception as error:
            late = refusal(error)
            kind = UNREADABLE if raised_by_us(error) else LATE
            return Verdict(kind, late.detail) if late.kind == REFUSED else late
    if difference(expected, look(model)):
        return Verdict(ERROR, "writing changed the model")
    if isinstance(sent, nn.Module):
        expected = look(sent)
    return compare(again, look, expected, way.tolerance, warned or said(heard, names))


def refused_to_write(error: Exception, folder: Path) -> Verdict:
    """As :func:`refusal`, when writing: a refusal must leave no file."""
    refused, left = refusal(error), [file.name for file in folder.iterdir()]
    if left and refused.kind == REFUSED and raised_by_us(error):
        return Verdict(ERROR, f"refused to write, and left {left}")
    return refused


def compare(again: nn.Module, look: Looking, expected: list[Tensor], tolerance: float, warning: str) -> Verdict:
    """The verdict on a model that came back, with its warning if there was one."""
    try:
        amount = difference(expected, look(again))
    except Exception as error:
        return Verdict(ERROR, f"forward of the loaded model: {first_line(error)}")
    if amount <= tolerance:
        return Verdict(SAME, f"{amount:.1e}" if amount else "")
    return Verdict(WARNED, warning) if warning else Verdict(SILENT, f"{amount:.1e}")


def refusal(error: Exception) -> Verdict:
    """*refused* for an error that says what is wrong: ours starts with an argument, a strict reader's lists names."""
    text, ours = str(error), raised_by_us(error)
    if ours and isinstance(error, (ValueError, TypeError)) and OPENING.match(text):
        return Verdict(REFUSED, first_line(error))
    if not ours and OTHERS_REFUSE.search(text):
        return Verdict(REFUSED, first_line(error))
    return Verdict(ERROR, f"{type(error).__name__}: {first_line(error)} ({_raised_in(error).name})")


def raised_by_us(error: Exception) -> bool:
    return any(package in _raised_in(error).parents for package in PACKAGES)


def _raised_in(error: Exception) -> Path:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()


def first_line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def names_of(model: nn.Module) -> set[str]:
    """The names of a model's modules, parameters and buffers."""
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {*modules, *parameters, *(name for name, _ in model.named_buffers(remove_duplicate=False))} - {""}


def said(heard: Iterable[warnings.WarningMessage], names: set[str]) -> str:
    """The first UserWarning that names something of the model, or the paths.

    A name without a dot (``model``, ``norm``) may be an ordinary word: it counts only in quotes.
    """
    for warning in heard:
        text = str(warning.message)
        words = re.findall(r"[\w.]*\w", text)
        named = {word for word in words if "." in word or f"'{word}" in text}
        if issubclass(warning.category, UserWarning) and (named & names or "paths" in words):
            return first_line(text)
    return ""


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Every floating tensor that ``model`` returns in eval mode.

    All parameters are frozen for that: torch multiplies batches in another order if a weight requires grad.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval().requires_grad_(False)
    torch.manual_seed(0)  # some models hash with random planes
    try:
        return list(tensors_in(model(**inputs)))
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def tensors_in(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference of outputs, each relative to its largest value; infinite if they cannot be compared."""
    if [(t.shape, t.dtype) for t in expected] != [(t.shape, t.dtype) for t in got]:
        return float("inf")
    largest = 0.0
    for want, have in zip(expected, got):
        if torch.equal(want, have) or not want.numel():
            continue
        amount = float((want.double() - have.double()).abs().max() / want.double().abs().max())
        largest = max(largest, amount if amount == amount else float("inf"))
    return largest
