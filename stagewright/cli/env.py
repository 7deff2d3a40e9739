"""`stagewright env`: versions and devices, for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from stagewright import __version__
from stagewright.cli.output import Json, console, print_document

PACKAGES = (
    "numpy",
    "numba",
    "scipy",
    "highspy",
    "pulp",
    "networkx",
    "pydantic",
    "typer",
    "torch",
    "transformers",
    "fastapi",
)


def env(json: Json = False) -> None:
    """Print versions, processors and devices. No host name and no path is printed.

    Example: stagewright env --json
    """
    document: dict[str, object] = {
        "stagewright": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
    }
    if json:
        print_document(document)
        return
    screen = console()
    for key, value in document.items():
        if isinstance(value, dict):
            screen.print(f"{key}:")
            for name, version in value.items():
                screen.print(f"  {name} {version or 'not installed'}")
        else:
            screen.print(f"{key}: {value}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if _version("torch") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    sys.stderr.flush()
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
