"""Which reference it is: by content alone, and without reading the weights again while they are the same files."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import save_tiny

from kto_dist.base.errors import UserError
from kto_dist.store.fingerprint import SCORING, Fingerprint, fingerprint
from kto_dist.store.hashes import Hashing, file_digests

FACTS = {"dtype": "float32", "logits": "float32", "attention": "sdpa"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kto_dist" / "hashes"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Weights alone, 16 tensors."""
    rng = np.random.default_rng(0)
    (tmp_path / "model").mkdir()
    tensors = {f"layer.{n}": rng.normal(size=(8, n + 1)).astype(np.float32) for n in range(16)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


class Reads:
    """Reads files as everyone does, notes every block that is hashed, and takes old files for settled."""

    def __init__(self, before: Callable[[], object] = lambda: None, **changes: object):
        self.count, self._before = 0, before
        self.how = Hashing(**{"settled_seconds": -1.0, "pread": self._pread, **changes})

    def _pread(self, *block: int) -> bytes:
        self._before()
        data = os.pread(*block)
        self.count += 1
        return data


SETTLED = Hashing(settled_seconds=-1.0)


def of(folder: Path, config: dict | None = None, how: Hashing = SETTLED, **changes: str) -> Fingerprint:
    return fingerprint(folder, None, config or {"layers": 2}, hashing=how, **{**FACTS, **changes})


def test_the_name_and_place_of_a_model_are_no_part_of_it(model, tmp_path):
    before = of(model, {"layers": 2, "_name_or_path": "here", "transformers_version": "5.0"})
    moved = model.rename(tmp_path / "moved")
    assert of(moved, {"layers": 2, "_name_or_path": "there", "transformers_version": "6.0"}) == before
    assert of(Path(shutil.copytree(moved, tmp_path / "copy"))) == before


def test_each_thing_that_decides_a_log_prob_is_part_of_it(model):
    seen = {of(model), of(model, {"layers": 3})}
    changes = (
        {"dtype": "bfloat16"},
        {"logits": "bfloat16"},
        {"attention": "eager"},
        {"kernels": "liger"},
        {"quantisation": "nf4"},
    )
    for change in changes:
        seen.add(of(model, **change))
    assert len({one.digest for one in seen}) == 7


def test_a_mended_fault_makes_another_reference_of_its_family_alone(model, monkeypatch):
    config, other = {"model_type": "mended", "layers": 2}, {"model_type": "other", "layers": 2}
    before = of(model, config), of(model, other)
    monkeypatch.setitem(SCORING, "mended", 1)
    assert of(model, config) != before[0] and of(model, config).scoring == 1
    assert of(model, other) == before[1]


@pytest.mark.parametrize(
    ("config", "dtype", "wanted"),
    [
        ({"model_type": "llama"}, "bfloat16", None),
        # completions of one prompt saw each other, by less than what counted as rounding in bf16
        ({"model_type": "zamba"}, "bfloat16", 1),
        ({"model_type": "zamba"}, "float32", None),
        # what the family keeps in fp32 was kept so in bf16, unlike the policy's
        ({"model_type": "deepseek_v4"}, "bfloat16", 1),
        ({"model_type": "deepseek_v4"}, "float32", None),
        ({"model_type": "bailing_hybrid"}, "float32", None),
        ({"model_type": "bailing_hybrid"}, "bfloat16", 2),
        # rows were turned by the frequencies of the longest beside them
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "float32", 1),
        ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "float32", 1),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "default"}}, "float32", None),
    ],
)
def test_only_what_was_stored_wrong_is_scored_again(model, config, dtype, wanted):
    assert of(model, config, dtype=dtype).scoring == wanted


def test_stores_from_before_a_field_existed_keep_their_values():
    # the digest of version 0.1, of these five fields
    old = Fingerprint(weights="w", config="c", dtype="float32", logits="float32", attention="sdpa")
    assert old.digest == "5f3e3893c3a8becfbeb6846a134719a7484c1853cafafee595993ead73cc65df"
    assert set(old.to_dict()) == {"weights", "config", "dtype", "logits", "attention"}


@pytest.mark.parametrize("change", ("value", "name", "shape", "dtype", "swap", "removed"))
def test_any_change_to_a_tensor_is_another_reference(model, change):
    before = of(model)
    tensors = load_file(model / "model.safetensors")
    if change == "value":
        tensors["layer.7"][3, 3] = np.nextafter(tensors["layer.7"][3, 3], np.float32(9))
    elif change == "name":
        tensors["layer.x"] = tensors.pop("layer.7")
    elif change == "shape":
        tensors["layer.7"] = tensors["layer.7"].T.copy().reshape(8, 8)[:, ::-1].copy().reshape(4, 16)
    elif change == "dtype":
        tensors["layer.7"] = tensors["layer.7"].view(np.int32)
    elif change == "swap":
        tensors["layer.7"], tensors["layer.6"] = tensors["layer.6"], tensors["layer.7"]
    else:
        del tensors["layer.7"]
    save_file(tensors, model / "model.safetensors")
    assert of(model) != before


def test_the_same_tensors_in_other_files_are_the_same_reference(model, tmp_path):
    before = of(model)
    tensors = load_file(model / "model.safetensors")
    # other metadata, another order
    save_file(dict(reversed(tensors.items())), model / "model.safetensors", metadata={"format": "pt"})
    assert of(model) == before
    (model / "model.safetensors").unlink()
    where = {name: f"model-{1 + n % 3:05d}-of-00003.safetensors" for n, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert of(model) == before


def test_weights_that_transformers_does_not_load_are_no_part_of_it(model):
    before = of(model)
    (model / "consolidated.safetensors").write_bytes(b"another layout of the same")
    (model / "pytorch_model.bin").write_bytes(b"older")
    assert of(model) == before


def test_a_saved_model_is_the_same_when_transformers_splits_it(tmp_path):
    from transformers import AutoModelForCausalLM

    whole = save_tiny(tmp_path / "whole")
    lm = AutoModelForCausalLM.from_pretrained(whole)
    lm.save_pretrained(tmp_path / "split", max_shard_size="100KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert of(tmp_path / "split").weights == of(whole).weights


def test_a_model_is_read_once_and_remembered(model, tmp_path):
    reads = Reads()
    before = of(model, how=reads.how)
    assert reads.count == 16
    assert of(model, how=reads.how) == before and of(model.rename(tmp_path / "moved"), how=reads.how) == before
    assert reads.count == 16


@pytest.mark.parametrize("how", ("in place", "with its old time", "replaced", "copied over"))
def test_a_changed_file_is_never_taken_for_the_one_before(model, tmp_path, how):
    before, file = of(model), model / "model.safetensors"
    assert of(model) == before
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[-3] ^= 1
    if how == "replaced":
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(tmp_path / "new", file)
    elif how == "copied over":
        (tmp_path / "new").write_bytes(content)
        os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        shutil.copy2(tmp_path / "new", file)
    else:
        with file.open("r+b") as opened:
            opened.write(content)
        if how == "with its old time":
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    assert of(model) != before


def test_a_change_that_no_sample_meets_is_seen_by_the_time_of_change(tmp_path):
    how = Hashing(settled_seconds=-1.0, samples=0)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(bytes(10_000))
    before, stat = file_digests([file], how), file.stat()
    trial = tmp_path / "trial"
    # within a tick of the file system's clock
    while not trial.exists() or trial.stat().st_ctime_ns <= stat.st_ctime_ns:
        trial.write_bytes(b"x")
        time.sleep(0.001)
    with file.open("r+b") as opened:
        opened.write(b"\1")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert file_digests([file], how) != before


def test_a_change_that_no_time_shows_is_seen_by_the_sample(tmp_path):
    """As on a file system that keeps no times."""
    file = tmp_path / "pytorch_model.bin"

    def timeless(descriptor):
        seen = os.stat(descriptor)
        kept = {name: getattr(seen, name) for name in ("st_dev", "st_ino", "st_size")}
        return SimpleNamespace(**kept, st_mtime_ns=0, st_ctime_ns=0, st_mtime=0.0, st_ctime=0.0)

    how = Hashing(settled_seconds=-1.0, fstat=timeless)
    file.write_bytes(bytes(10_000))
    before = file_digests([file], how)
    with file.open("r+b") as opened:
        opened.write(b"\1" * 10_000)
    assert file_digests([file], how) != before


def test_a_file_as_young_as_its_clock_is_coarse_is_not_remembered(model, cache):
    reads = Reads(settled_seconds=3600 * Hashing().settled_seconds)  # on a machine of any speed
    of(model, how=reads.how)
    read = reads.count
    assert not cache.exists() or not list(cache.iterdir())
    of(model, how=reads.how)
    assert reads.count == 2 * read


@pytest.mark.parametrize("damage", ("flipped", "truncated", "moved", "a folder"))
def test_a_damaged_memory_is_not_believed(model, cache, damage):
    before = of(model)
    (entry,) = cache.iterdir()
    content = entry.read_text()
    entry.unlink()
    if damage == "flipped":
        digit = content.index('"digests"') + 60
        entry.write_text(content[:digit] + ("0" if content[digit] != "0" else "1") + content[digit + 1 :])
    elif damage == "truncated":
        entry.write_text(content[: len(content) // 2])
    elif damage == "moved":  # what was remembered of another file
        save_file({"other": np.ones(3)}, model / "model.safetensors")
        other = of(model)
        (entry,) = cache.iterdir()
        entry.write_text(content)
        assert of(model) == other
        return
    else:
        entry.mkdir()
    assert of(model) == before


def test_without_a_place_to_remember_everything_works(model, tmp_path, monkeypatch):
    before = of(model)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert of(model) == before


def test_only_so_many_files_are_remembered(tmp_path, cache):
    for n in range(9):
        (tmp_path / f"{n}.bin").write_bytes(bytes([n]) * 100)
        file_digests([tmp_path / f"{n}.bin"], Hashing(settled_seconds=-1.0, remembered_files=5))
    assert len(list(cache.iterdir())) == 5


def test_large_tensors_are_hashed_in_blocks_and_every_byte_counts(tmp_path):
    reads = Reads(block=1000)
    file = tmp_path / "pytorch_model.bin"
    content, seen = bytearray(3500), set()
    for place in (None, 0, 999, 1000, 2999, 3000, 3499):
        if place is not None:
            content[place] ^= 1
        file.write_bytes(content)
        seen.add(file_digests([file], reads.how)[0][""])
    assert len(seen) == 7 and reads.count == 7 * 4


@pytest.mark.parametrize("files", (1, 2))
def test_blocks_of_a_file_and_of_several_are_hashed_at_the_same_time(tmp_path, files):
    meeting = threading.Barrier(2)
    # for ever, if one block were hashed after the other
    reads = Reads(before=lambda: meeting.wait(timeout=240), block=1000)
    paths = [tmp_path / f"{n}.bin" for n in range(files)]
    for path in paths:
        path.write_bytes(bytes(2000 // files))
    assert len(file_digests(paths, reads.how)) == files


def test_a_file_that_changes_while_it_is_read_is_refused(model):
    def meddle():
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\7")

    with pytest.raises(UserError, match="model.safetensors changed while it was read: start again"):
        of(model, how=Reads(before=meddle).how)


@pytest.mark.parametrize("keep", (0, 4, 100, -1, -100))
def test_a_truncated_file_is_refused_with_its_name(model, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model.safetensors is (no safetensors file|truncated at).*again"):
        of(model)


def test_what_cannot_be_scored_is_refused_with_a_remedy(model):
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds an adapter, whose base model lies elsewhere: merge"):
        of(model)
    (model / "adapter_config.json").unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights: it needs model.safetensors"):
        of(model)
    (model / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="is no index of weight files"):
        of(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(UserError, match=r"gone.safetensors cannot be read .*check the path"):
        of(model)
