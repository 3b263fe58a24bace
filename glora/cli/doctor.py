"""``glora doctor``: what this machine offers."""

from __future__ import annotations

import argparse
import json


def add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="versions, devices, backends, and why others are not available",
        description="Say what this machine offers GLoRA. Exits with 1 if something required is missing.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from ..doctor import examine, format_findings

    findings = examine()
    print(json.dumps(findings) if options.json else format_findings(findings))
    return 1 if findings["problems"] else 0
