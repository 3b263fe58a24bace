"""What :func:`glora_kernels.explain` returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..planning.prediction import Prediction
from ..planning.prices import PricedLaunch


@dataclass(frozen=True)
class Explanation:
    """The plan of one ``glora_linear`` call and of its backward pass.

    Attributes:
        backend: where the call goes.
        reason: why that backend.
        strategy: how the backend goes about it.
        tokens, outputs, inputs: M, N, K.
        forward_units, backward_units: dense GEMMs of 2 M N K operations each.
        forward_flops, backward_flops: multiplications and additions of all matrix products.
        saved: what is kept for backward besides parameters; ``"token sums"`` are ``sum_k x_mk``, kept in place of x.
            x may be formed again in its place, see :func:`glora_kernels.recompute_inputs`.
        saved_bytes: its size, including an output that the rest of the graph holds anyway.
        architecture: ``sm_90``, ``gfx942`` and the like; this and the following for the Triton backend only.
        route: the route of its backward pass, see docs/strategies.md.
        choice: why its strategy was picked.
        predictions: launches, operations, bytes and seconds of both strategies, the one that is taken first.
    """

    backend: str
    reason: str
    strategy: str
    tokens: int
    outputs: int
    inputs: int
    forward_units: int
    backward_units: int
    forward_flops: int
    backward_flops: int
    saved: tuple[str, ...]
    saved_bytes: int
    architecture: str | None = None
    route: str | None = None
    choice: str | None = None
    predictions: tuple[Prediction, ...] = ()

    def to_dict(self) -> dict:
        """Plain data, as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        kept = " and ".join(self.saved) or "nothing"
        lines = [
            f"backend   {self.backend} ({self.reason})",
            f"strategy  {self.strategy}",
            f"shape     M = {self.tokens} tokens, N = {self.outputs} out, K = {self.inputs} in",
            f"forward   {self.forward_units} dense GEMM, {self.forward_flops / 1e9:.3f} GFLOP in all",
            f"backward  {self.backward_units} dense GEMM, {self.backward_flops / 1e9:.3f} GFLOP in all",
            f"saved     {kept}, {self.saved_bytes:,} bytes",
        ]
        if self.predictions:
            lines += [f"choice    {self.choice}", f"predicted for {self.architecture}, route {self.route}:"]
            differ = len({prediction.seconds for prediction in self.predictions}) > 1
            lines += [line for way in self.predictions[: 1 + differ] for line in _lines(way)]
        return "\n".join(lines)


def _lines(prediction: Prediction) -> list[str]:
    first = (
        f"  {prediction.strategy:9} {prediction.seconds * 1e6:,.1f} us, {prediction.scratch_bytes:,} bytes of scratch"
    )
    ways = {
        "forward": (prediction.forward, prediction.forward_seconds),
        "backward": (prediction.backward, prediction.backward_seconds),
    }
    return [first, *(f"    {name:8}  {_summary(*way)}" for name, way in ways.items() if way[0])]


def _summary(launches: tuple[PricedLaunch, ...], seconds: float) -> str:
    moved, flops = sum(launch.bytes for launch in launches), sum(launch.flops for launch in launches)
    names = ", ".join(launch.name for launch in launches)
    return f"{seconds * 1e6:,.1f} us, {moved / 1e6:,.1f} MB, {flops / 1e9:,.3f} GFLOP in {len(launches)}: {names}"
