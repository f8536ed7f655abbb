"""A Llama of random weights, its tokenizer, and rows of random words: what a measurement of speed needs of a model.

    python benchmarks/random_model.py 1.2b FOLDER      # writes FOLDER with config, weights (bf16) and tokenizer

Speed depends on shapes alone, so nothing has to be downloaded. A word of the rows is a token of the tokenizer.
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import disk_usage

SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama with tied embeddings."""

    title: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "1.2b": Shape(
        title="1.24 billion random parameters in the shape of Llama 3.2 1B",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "135m": Shape(
        title="135 million random parameters in the shape of SmolLM2 135M",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
    "small": Shape(
        title="a small model of 8 million random parameters",
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8192,
    ),
    "tiny": Shape(
        title="a tiny model",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Words of a row's prompt and completion: lognormal around these medians."""

    prompt: int
    completion: int
    sigma: float = 0.7


LENGTHS = {
    "mixed": Lengths(prompt=120, completion=180),
    "short-chats": Lengths(prompt=40, completion=60),
    "long-prompts": Lengths(prompt=500, completion=60),
    "long-answers": Lengths(prompt=60, completion=500),
}


def fast_folder(needed: int) -> str | None:
    """A folder in memory with room for so many bytes, else the usual one for temporary files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and disk_usage(memory).free > needed else None


def weight_bytes(name: str) -> int:
    """Of the weights in bf16, roughly."""
    shape = SHAPES[name]
    layer = 3 * shape.hidden_size * shape.intermediate_size + 4 * shape.hidden_size**2
    return 2 * (shape.num_hidden_layers * layer + shape.vocab_size * shape.hidden_size)


def make_model(name: str, folder: Path) -> float:
    """Writes the model to `folder`, unless it is there; returns the seconds that it took."""
    if (folder / "complete").exists():
        return 0.0
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    started = time.monotonic()
    shape = SHAPES[name]
    vocabulary = {"<eos>": 0, "<unk>": 1} | {f"w{word}": word + 2 for word in range(shape.vocab_size - 2)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        **{key: value for key, value in asdict(shape).items() if key != "title"},
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    (folder / "complete").touch()
    return time.monotonic() - started


def write_log(name: str, lengths: str, rows: int, longest: int, file: Path) -> None:
    """JSON lines of prompt, completion and label, no row of more than `longest` words."""
    draw, shape = random.Random(SEED), LENGTHS[lengths]
    words = SHAPES[name].vocab_size - 2

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(words)}" for _ in range(count))

    def length(median: int) -> int:
        return max(2, round(median * draw.lognormvariate(0, shape.sigma)))

    lines = []
    while len(lines) < rows:
        prompt, completion = length(shape.prompt), length(shape.completion)
        if prompt + completion < longest:  # the completion ends with a token of its own
            row = {"prompt": text(prompt), "completion": " " + text(completion), "label": draw.random() < 0.5}
            lines.append(json.dumps(row) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path, nargs="?", help="by default a new temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(dir=fast_folder(2 * weight_bytes(arguments.name))))
    seconds = make_model(arguments.name, folder)
    print(f"{folder}: {seconds:.1f} s")


if __name__ == "__main__":
    main()
