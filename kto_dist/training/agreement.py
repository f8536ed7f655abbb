"""Hosts agree before anything is loaded: on the settings, on the code and the libraries that run, on their devices.

A host with another learning rate would train a wrong model in silence, and one with another number of steps would hang
the job. Collective, on every rank, once a job.
"""

import importlib.metadata
import json
import platform
from contextlib import suppress
from pathlib import Path

import torch

from kto_dist.base import agree, comm, hosts
from kto_dist.base.config import flatten
from kto_dist.base.files import sha256_of
from kto_dist.base.secrets import masked
from kto_dist.base.source import source_digest
from kto_dist.training.config import Config

OWN = frozenset(
    {"data.workers", "data.cache", "deepspeed.nvme_path", "reference.nvme_path", "train.output", "reference.store"}
    | {"model.path", "reference.path", "data.train", "data.heldout", "deepspeed.config"}
)
"""Settings that each host may have for itself: its cores, where it writes, and where it finds what is compared by its
content: weights, tokens and files."""
PLAN = frozenset({"train.seed", "train.global_batch", "train.epochs", "train.max_steps"})
"""Of `train`, what a reference pass asks for as well."""
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "triton", "peft", "flash_attn", "liger_kernel")
"""Libraries that change numbers or files; of those that a host lacks, so must the others."""


def begin_together(job: str, config: Config, *, words: dict[str, str] | None = None) -> None:
    """Collective, before anything is loaded. Ranks wait for each other as long as the config says from now on.

    `job`: train, precompute, evaluate; `words`: what else its command line says.
    Raises `UserError`, on every rank, that names every fact that differs, with the hosts.
    """
    comm.set_timeout(config.cluster.timeout)
    if comm.world_size() == 1:
        return
    hosts.check_layout()
    agree.facts(
        {
            "start the same command with the same config file on each of them": {
                "the command": job,
                **(words or {}),
                **settings_of(job, config),
            },
            "copy the same files to each of them": files_of(config),
            "install the same packages on each of them, as in constraints.txt": software(),
            "take hosts with devices of one kind": {"device": device()},
        }
    )


def settings_of(job: str, config: Config) -> dict[str, str]:
    """By `section.key`, without passwords. A reference pass, which may have hosts of its own, asks nothing of what the
    policy alone uses."""
    found = {
        f"{section}.{key}": masked(value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for section, key, value in flatten(config)
        if f"{section}.{key}" not in OWN
    }
    if job != "precompute":
        return found
    asked = ("data.", "model.trust", "objective.", "reference.", "cluster.")
    return {name: value for name, value in found.items() if name.startswith(asked) or name in PLAN}


def files_of(config: Config) -> dict[str, str]:
    """What the files hold whose names alone stand in the config, and that every rank reads."""
    named = {"deepspeed.config": config.deepspeed.config}
    for rule in config.health.rules:
        named[f"health.rules {rule}"] = rule.rpartition(":")[0]
    found = {}
    for name, path in named.items():
        if path is not None and (path.endswith((".py", ".json")) or Path(path).is_file()):
            try:
                found[f"the content of {name}"] = sha256_of(Path(path))[:16]
            except OSError:
                found[f"the content of {name}"] = "cannot be read"
    return found


def software() -> dict[str, str]:
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "kto_dist": _version("kto_dist")}
    versions |= {package: _version(package) for package in PACKAGES}
    return {f"version of {name}": version for name, version in versions.items()} | {
        "source of kto_dist": source_digest()
    }


def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def device() -> str:
    """A GPU's name and memory; CPUs count as one kind."""
    if not torch.cuda.is_available():
        return "cpu"
    found = torch.cuda.get_device_properties(comm.device())
    return f"{found.name}, {round(found.total_memory / 2**30)} GiB"
