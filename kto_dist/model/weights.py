"""What a checkpoint's files hold against what its model needs: known from their headers, before anything is loaded.

In:  weight files, a config, a dtype. Out: `Weights`, what is left over and what is rounded. Raises `UserError` where
tensors are missing or of another shape: transformers would fill them with random numbers and say so in a log.

A model on torch's meta device is given tensors without contents, so that names are translated and experts are put
together as they will be, whatever shards the model later.
"""

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from kto_dist.base.errors import UserError
from kto_dist.model.loading import model_class, one_line, own_config, shortened
from kto_dist.store.fingerprint import weight_files


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Of a checkpoint, by names of tensors."""

    unknown: tuple[str, ...] = ()
    """In the files, and the model has no place for them."""
    apart: tuple[str, ...] = ()
    """In the files, and of parts that are no language model's, as the family says: its vision tower, its MTP layers."""
    rounded: tuple[str, ...] = ()
    """Parameters that the family would keep in fp32, and that are in the training dtype here."""
    untied: tuple[str, ...] = ()
    """Tied to another tensor by config.json, and different from it in the files: transformers then ties nothing."""

    def warnings(self, name: str, *, exported: bool) -> list[str]:
        """`name`: the setting of the model. `exported`: it is trained, and written."""
        said = []
        if self.unknown:
            said.append(
                f"{name}: {len(self.unknown)} tensors of the files have no place in the model and are not used"
                + " (nor exported)" * exported
                + f": {shortened(self.unknown)}; if they should be, config.json is another model's"
            )
        if self.apart:
            said.append(
                f"{name}: {len(self.apart)} tensors of the files are no part of the language model "
                f"({shortened(self.apart)})" + (": they are not trained, and the export will not hold them" * exported)
            )
        if self.rounded:
            said.append(
                f"{name}: {len(self.rounded)} parameters that this family keeps in fp32 are rounded to the dtype of "
                f"the others ({shortened(self.rounded)}); dtype fp32 keeps them as they are"
            )
        if self.untied:
            said.append(
                f"{name}: config.json ties {shortened(self.untied)} to the embedding, and the files hold another "
                "tensor for it: both are used as they are"
                + ", and trained apart" * exported
                + "; set tie_word_embeddings to false in config.json if that is meant, else take one out of the files"
            )
        return said

    def summary(self) -> dict[str, Any]:
        return {
            name: {"count": len(tensors), "names": sorted(tensors)[:NAMED]}
            for name, tensors in (
                ("unknown", self.unknown),
                ("apart", self.apart),
                ("rounded", self.rounded),
                ("untied", self.untied),
            )
        }


NAMED = 50
"""Tensors of a kind that the summary names."""


def check_weights(
    name: str, path: str, folder: Path, gguf_file: str | None, config: PretrainedConfig, dtype: torch.dtype
) -> Weights:
    """`name`: the setting that gives `path`, whose files lie in `folder`. Raises `UserError`.

    Files that are unpacked as they are loaded (GGUF, quantised) are known only then: `load_model` looks at them.
    """
    if gguf_file or getattr(config, "quantization_config", None):
        return Weights()
    kind, own = model_class(config), own_config(config)
    assert kind is not None, "load_config refuses what no class is for"
    files = weight_files(folder)
    files += [folder / extra for extra in type(own).extra_files if (folder / extra).exists()]
    there: dict[str, Tensor] = {}
    homes: dict[str, Path] = {}
    for file in files:
        for tensor, shape in _headers(name, file):
            there[tensor], homes[tensor] = shape, file
    # what the family overlooks is named as well
    plain: Any = type(
        kind.__name__, (kind,), {"_keys_to_ignore_on_load_unexpected": None, "__module__": kind.__module__}
    )
    with _quietly():
        try:
            lm, found = plain.from_pretrained(
                None,
                config=own,
                state_dict=dict(there),
                dtype=dtype,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the weights in {name} ({path}) do not fit a {config.model_type} model: {one_line(error)}; is its "
                "config.json the right one?"
            ) from None
    missing, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if missing or mismatched:
        raise UserError(_misfit(f"{name} ({path})", lm, there, missing, mismatched, found["unexpected_keys"]))
    apart = [re.compile(pattern) for pattern in kind._keys_to_ignore_on_load_unexpected or ()]
    overlooked = {tensor for tensor in found["unexpected_keys"] if any(p.search(tensor) for p in apart)}
    # masks and tables of positions, which once were saved
    overlooked -= {tensor for tensor in overlooked if _is_buffer(tensor)}
    return Weights(
        unknown=tuple(sorted(t for t in found["unexpected_keys"] - overlooked if not _is_buffer(t))),
        apart=tuple(sorted(overlooked)),
        rounded=tuple(sorted(n for n, p in lm.named_parameters() if p.is_floating_point() and p.dtype != dtype)),
        untied=tuple(sorted(_untied(lm, homes))),
    )


def _untied(lm: PreTrainedModel, homes: Mapping[str, Path]) -> list[str]:
    """`homes`: the file of each tensor. Contents are read of tied tensors alone, where the files hold both."""
    tied = lm.all_tied_weights_keys.items()
    pairs = [(own, other) for own, other in tied if own in homes and other in homes]
    return [own for own, other in pairs if not torch.equal(_content(homes[own], own), _content(homes[other], other))]


def _content(file: Path, tensor: str) -> Tensor:
    """Read as it is looked at, and not into memory."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            found: Tensor = opened.get_tensor(tensor)
            return found
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)[tensor]
    except RuntimeError:  # an old form, which can only be read whole
        found = torch.load(file, map_location="cpu", weights_only=True)[tensor]
    return found


def _is_buffer(tensor: str) -> bool:
    return re.search(r"(attn|attention)\.(bias|masked_bias)$|inv_freq$|position_ids$", tensor) is not None


def _misfit(
    named: str,
    lm: PreTrainedModel,
    there: dict[str, Tensor],
    missing: Sequence[str],
    mismatched: Sequence[tuple[str, torch.Size, torch.Size]],
    unexpected: Iterable[str],
) -> str:
    """One sentence of what is wrong, what it may come from, and what helps."""
    needed = len(lm.state_dict())
    said = []
    if missing:
        said.append(f"lack {len(missing)} of the {needed} tensors of {type(lm).__name__} ({shortened(missing)})")
    if mismatched:
        shapes = [f"{n} is {_sizes(file)} and should be {_sizes(model)}" for n, file, model in mismatched[:3]]
        more = f" and {len(mismatched) - 3} more" if len(mismatched) > 3 else ""
        said.append(f"have {len(mismatched)} of another shape ({', '.join(shapes)}{more})")
    return (
        f"the weight files of {named} {' and '.join(said)}, which would be random numbers: "
        f"{_cause(lm, there, missing, list(unexpected))}"
    )


def _cause(lm: PreTrainedModel, there: dict[str, Tensor], missing: Sequence[str], unexpected: Sequence[str]) -> str:
    if not missing:
        return "config.json and weights are of different models or sizes; take both from one checkpoint"
    if (prefix := _prefix(missing, unexpected)) is not None:
        return f'the names in the files begin with "{prefix}": save them without it'
    head = lm.get_output_embeddings()
    names = {f"{name}.{own}" for name, part in lm.named_modules() if part is head for own, _ in part.named_parameters()}
    if set(missing) <= names:
        return (
            "this is a base model without its LM head; give the checkpoint that has one, or set tie_word_embeddings in "
            "config.json if its head is its embedding"
        )
    wanted, held = _layers(lm.state_dict()), _layers(there)
    if 0 < held < wanted and all(_layers([name]) > held for name in missing):
        return f"config.json counts {wanted} layers and the files hold {held}; take both from one checkpoint"
    return (
        f"config.json names another architecture (model_type {lm.config.model_type}) than the weights', or files are "
        "missing; take both from one checkpoint"
    )


def _prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """What all names in the files have in front of the model's."""
    for tensor in unexpected:
        for name in missing:
            if tensor.endswith("." + name):
                prefix = tensor.removesuffix(name)
                if all(each.startswith(prefix) for each in unexpected):
                    return prefix
    return None


def _layers(names: Iterable[str]) -> int:
    """One more than the highest number in a name."""
    numbers = [int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))]
    return 1 + max(numbers, default=-1)


def _sizes(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape) or "a number"


def _headers(name: str, file: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors without contents. Raises `UserError` where the file is damaged."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for tensor in opened.keys():  # noqa: SIM118  # it is no dict
                    part = opened.get_slice(tensor)
                    yield tensor, torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype()), device="meta")
        else:
            for tensor, value in torch.load(file, map_location="meta", weights_only=True).items():
                if isinstance(value, Tensor):
                    yield tensor, value
    except FileNotFoundError:
        raise UserError(f"{file} does not exist, and the index of weight files in {name} names it: fetch it") from None
    except (
        OSError,
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        AttributeError,
        KeyError,
    ) as error:
        size = file.stat().st_size if file.exists() else 0
        raise UserError(
            f"{file} ({size:,} bytes) cannot be read as weights, it is damaged or cut short: {one_line(error)}; fetch "
            "or copy it again"
        ) from None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers prints a table of what is missing, and bars."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
