"""Every causal family of the installed transformers, as a tiny random model, against its own plain forward.

    python benchmarks/zoo.py [--families llama,gpt2] [--dtypes fp32,bf16] [--ways padded,packed,shared,training]
                             [--json FILE]

For each family and dtype, with what kto_dist chooses by itself:

1. padded, packed, shared   log-probs of completions, each beside others, against the family's class given one sequence
                            of token ids and nothing else: the largest difference over the root of the tokens
2. training                 two steps with `kto_dist.train`, and whether what was exported loads whole

A way that kto_dist refuses is told with its sentence, one that ends in any other error with that error. Families run
in processes of a few each, with a time limit, so that a crash costs one family.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import records
from zoo_models import FAMILIES, VOCABULARY, config_of

WAYS = ("padded", "packed", "shared", "training")
DTYPES = ("fp32", "bf16")
CHUNK = 6
"""Families of one process."""
SECONDS = 180
"""That a family may take: what is silent for longer is stopped."""
LONGEST = 48
"""Tokens of a row: eight times the windows."""
LENGTHS = ((3, 5), (9, 31), (1, 9), (14, 34), (2, 14), (9, 7))
"""(prompt, completion) tokens; the last has the second one's prompt."""


def sequences() -> list[tuple[Any, Any]]:
    import numpy as np

    draw = np.random.default_rng(0)
    pairs = [(draw.integers(3, VOCABULARY, p), draw.integers(3, VOCABULARY, c)) for p, c in LENGTHS]
    pairs[5] = (pairs[1][0], pairs[5][1])
    return pairs


def save(kind: str, folder: Path) -> None:
    """A random model with no weight that hides an effect: biases and scales that start at 0 or 1 are moved."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config_of(kind), dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    lm.save_pretrained(folder)


def own_logps(folder: Path, dtype: Any) -> Any:  # (S,) fp64
    """By the family's class, in transformers' own attention, each sequence alone."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    found = []
    for prompt, completion in sequences():
        ids = torch.tensor(np.concatenate([prompt, completion]))[None]
        with torch.no_grad():
            logits = lm(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(logits.double().log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(found)


def our_logps(folder: Path, dtype: Any, way: str) -> Any:  # (S,) fp64
    """As the reference pass and training score them. Raises `UserError` where kto_dist refuses."""
    import numpy as np
    import torch

    from kto_dist.base.errors import UserError
    from kto_dist.data.batch import collate, cut
    from kto_dist.model.attention import pick_attention, pick_packing, switch_length
    from kto_dist.model.causal_lm import ScoringModel, completion_logps
    from kto_dist.model.checks import check_scoring
    from kto_dist.model.loading import load_config, load_model
    from kto_dist.model.trial import check_runs
    from kto_dist.reference.prefix import can_share, lay_out, sharing_is_exact

    device = torch.device("cpu")
    config = load_config(str(folder))
    attention = pick_attention("model.attention", "auto", config, device, dtype)
    packed = way == "packed" and pick_packing("train.packing", True, attention, config, LONGEST)
    if way == "shared" and (reason := can_share(config, attention, LONGEST)):
        raise UserError(reason)
    lm = load_model(str(folder), gguf_file=None, dtype=dtype, attention=attention, config=config)
    model = ScoringModel(lm.eval())
    check_runs(model, model, device)
    rounding = check_scoring(model, model, device, packed=packed, max_length=LONGEST)
    pairs = sequences()
    if way == "shared":
        if not sharing_is_exact(model, model, device, LONGEST, rounding):
            raise UserError("completions of one prompt see each other")
        alone = [pairs[0], pairs[2], pairs[3], pairs[4]]
        trees = [(pairs[1][0], [pairs[1][1], pairs[5][1]]), *((prompt, [completion]) for prompt, completion in alone)]
        batches = [lay_out(trees, np.array([1, 5, 0, 2, 3, 4]))]
    else:
        lengths, apart = np.array([sum(pair) for pair in LENGTHS]), switch_length(config, LONGEST)
        shares = cut(lengths, tokens=6 * LONGEST, ranks=1, packed=packed, apart=apart)[0]
        batches = [collate([pairs[row] for row in share], share, packed=packed) for share in shares]
    found = torch.zeros(len(pairs), dtype=torch.float64)
    for batch in batches:
        with torch.no_grad():
            found[batch.position] = completion_logps(model, batch, model.transform, 2**28)
    return found


def scores(folder: Path, dtype_name: str, way: str) -> dict[str, Any]:
    """How far our log-probs are off the family's own, in nats over the root of the tokens."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    ours = our_logps(folder, dtype, way)
    try:
        own = own_logps(folder, dtype)
    except (RuntimeError, TypeError) as error:
        return {"refused": f"its own class does not run in {dtype_name}: {' '.join(str(error).split())[:200]}"}
    root = torch.tensor([float(length) for _, length in LENGTHS]).sqrt()
    return {"off": float(((ours - own).abs() / root).max())}


def tokenizer() -> Any:
    """A token a byte, since some families bring a class of their own that wants a byte-level vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: number for number, letter in enumerate(letters, start=3)}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def text(tokens: Any) -> str:
    return "".join(chr(ord("a") + int(token) % 26) for token in tokens)


def trains(folder: Path, dtype_name: str) -> dict[str, Any]:
    """Two steps, whose start is checked, and an export without a missing tensor."""
    import torch
    from transformers import AutoModelForCausalLM

    from kto_dist.training.config import Config
    from kto_dist.training.loop import train

    with tempfile.TemporaryDirectory() as place:
        rows = [{"prompt": text(prompt), "completion": text(completion)} for prompt, completion in sequences()]
        log = Path(place) / "rows.jsonl"
        log.write_text("".join(json.dumps(row | {"label": n % 2 == 0}) + "\n" for n, row in enumerate(rows)))
        output = Path(place) / "run"
        config = Config.build(
            {
                "model": {"path": str(folder)},
                "reference": {"store": f"{place}/store", "dtype": dtype_name},
                "data": {"train": str(log), "max_length": LONGEST + 2, "cache": f"{place}/tokens", "workers": 1},
                "train": {
                    "output": str(output),
                    "global_batch": 6,
                    "max_steps": 2,
                    "lr": 1e-3,
                    "tokens_per_microbatch": 128,
                    "dtype": dtype_name,
                },
                "tracking": {"enabled": False, "report": False},
            }
        )
        summary = train(config)
        losses = [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        loader: Any = AutoModelForCausalLM
        lm, found = loader.from_pretrained(output / "export", output_loading_info=True)
        start = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.dtype).state_dict()
        moved = sum(not torch.equal(value, start[name]) for name, value in lm.state_dict().items() if name in start)
        return {
            "losses": losses,
            "missing": sorted(found["missing_keys"]),
            "moved": moved,
            "tensors": len(start),
            "warnings": len(summary.get("warnings", [])),
        }


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from kto_dist.base.errors import UserError

    try:
        return work()
    except UserError as error:
        return {"refused": " ".join(str(error).split())}
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def examine(kind: str, dtypes: list[str], ways: list[str]) -> dict[str, Any]:
    """The family's line of the results."""
    line: dict[str, Any] = {"family": kind}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # whether transformers itself makes a model of the family's config that takes token ids and nothing else
        made = attempt(lambda: save(kind, folder) or {"off": float(own_logps(folder, None).isfinite().all()) - 1})
        if "failed" in made:
            return line | {"unmade": made["failed"]}
        tokenizer().save_pretrained(folder)
        for dtype in dtypes:
            for way in ways:
                work = (lambda d=dtype: trains(folder, d)) if way == "training" else None
                line[f"{way} {dtype}"] = attempt(work or (lambda d=dtype, w=way: scores(folder, d, w)))
    return line


def quiet() -> None:
    import logging

    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def child(families: list[str], dtypes: list[str], ways: list[str]) -> None:
    """One JSON object a line on stdout, after a mark, since libraries print as they like."""
    quiet()
    for kind in families:
        print(MARK + json.dumps(examine(kind, dtypes, ways)), flush=True)


MARK = "zoo: "


def run_all(families: list[str], dtypes: list[str], ways: list[str], keep: Callable[[dict[str, Any]], None]) -> None:
    left = list(families)
    while left:
        chunk = left[:CHUNK]
        command = [sys.executable, __file__, "--child", "--families", ",".join(chunk)]
        command += ["--dtypes", ",".join(dtypes), "--ways", ",".join(ways)]
        done, ended = [], "ended without a result"
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL, text=True)
            lines, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(0.2)
                out.seek(0)
                found = sum(line.startswith(MARK) for line in out)
                if found > lines:
                    lines, since = found, time.monotonic()
                if time.monotonic() - since > SECONDS:
                    process.kill()
                    ended = f"took more than {SECONDS} seconds"
            out.seek(0)
            done = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK)]
        for line in done:
            keep(line)
        left = left[len(done) :]
        if len(done) < len(chunk):
            if process.returncode and process.returncode > 0:
                ended = f"ended with status {process.returncode}"
            keep({"family": left.pop(0), "crashed": ended})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas; default: all")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", type=Path, help="write the results here, when all families are done")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    families, dtypes, ways = (getattr(arguments, name).split(",") for name in ("families", "dtypes", "ways"))
    if arguments.child:
        child(families, dtypes, ways)
        return
    content = records.frame("zoo", {"dtypes": dtypes, "ways": ways, "longest": LONGEST}) | {"results": []}
    # half a table would count families that nobody has looked at
    until_done = arguments.json and arguments.json.with_suffix(".partial")

    def keep(line: dict[str, Any]) -> None:
        content["results"].append(line)
        records.write_json(until_done, content)
        print(json.dumps(line)[:2000], flush=True)

    run_all(families, dtypes, ways, keep)
    if until_done:
        until_done.replace(arguments.json)


if __name__ == "__main__":
    main()
