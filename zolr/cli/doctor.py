"""`zolr doctor`: what zolr finds on this machine."""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import typer

from zolr.cli.config import Settings, add, flag

REQUIRED = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "einops",
    "safetensors",
    "typer",
    "rich",
    "pydantic",
    "torchmetrics",
)
EXTRAS = {
    "plot": ("matplotlib",),
    "lora": ("peft",),
    "quant": ("bitsandbytes", "torchao"),
    "track": ("tensorboard", "trackio"),
}


@dataclass(frozen=True)
class Doctor(Settings):
    """Settings of `zolr doctor`."""

    json: bool = flag(False, "Print JSON.", "Output", saved=False)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def run(settings: Doctor) -> None:
    """What zolr finds on this machine: versions, device, memory, disk, network, demo, extras."""
    found = examined()
    if settings.json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console

    from zolr.cli.screen import size, table

    rows = []
    for part, facts in found.items():
        for name, value in facts.items():
            shown = (
                size(value) if name.endswith("_bytes") else "not installed" if value is None else str(value)
            )
            # variables of the environment are spelled as they are set
            plain = name if name.isupper() else name.removesuffix("_bytes").replace("_", " ")
            rows.append((part, plain, shown))
    Console(highlight=False).print(table("zolr doctor", ("", "", ""), rows))


def register(app: typer.Typer) -> None:
    """Add the verb."""
    add(app, "doctor", Doctor, run, config=False)


def examined() -> dict[str, dict[str, Any]]:
    """The facts, by part."""
    import os
    import platform
    import shutil
    from pathlib import Path

    import torch

    from zolr.models import DEMO

    device: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    device["cores"] = cores()
    device["cuda"] = torch.version.cuda or "not in this build"
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        device[f"gpu{i}"] = torch.cuda.get_device_name(i)
        device[f"gpu{i}_free_bytes"], device[f"gpu{i}_total_bytes"] = free, total
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
    data = os.environ.get("ZOLR_DATA")
    return {
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "packages": {name: version_of(name) for name in ("zolr", *REQUIRED)},
        "device": device,
        "memory": _memory(),
        "disk": {"free_here_bytes": shutil.disk_usage(".").free},
        "hub": {
            "offline": "yes (HF_HUB_OFFLINE)" if offline else "no",
            "cache": f"{cache}{'' if cache.is_dir() else ' (absent)'}",
        },
        "demo": {"model": "present" if DEMO.is_dir() else "absent: install zolr from its wheel"},
        "data": {
            "ZOLR_DATA": "not set" if data is None else f"{data}{'' if Path(data).is_dir() else ' (absent)'}"
        },
        "extras": {f"{extra}: {name}": version_of(name) for extra, names in EXTRAS.items() for name in names},
    }


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> dict[str, int]:
    """Total and available memory of the machine, from the kernel; a container's limit where it is lower."""
    from pathlib import Path

    facts: dict[str, int] = {}
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        facts["total_bytes"] = int(lines["MemTotal"].split()[0]) * 1024
        facts["available_bytes"] = int(lines["MemAvailable"].split()[0]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit() and int(limit) < facts["total_bytes"]:
            facts["container_limit_bytes"] = int(limit)
    except OSError:
        pass  # another system: the facts that are missing are left out
    return facts
