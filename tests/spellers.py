"""Tokenizers of the kinds that models have, built on the spot: each with its own idea of what stands before a text."""

import re
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TRL = find_spec("trl")
_FOLDER = Path(_TRL.origin).parent / "chat_templates" if _TRL and _TRL.origin else Path("none")
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.jinja"))}
# What the templates of TRL mark turns with.
_MARKS = re.compile(r"<\|[A-Za-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_\w+>|<\|?turn\|?>|</?s>|<fake_token\w*>|<eos>")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def marks_of(template: str) -> list[str]:
    return sorted({*_MARKS.findall(template)})


def _with(backend: Tokenizer, template: str | None, *, marks_are_special: bool = True) -> PreTrainedTokenizerFast:
    for mark in marks_of(template or ""):
        backend.add_tokens([AddedToken(mark, normalized=False, special=marks_are_special)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def byte_level(template: str | None = None, **how: bool) -> PreTrainedTokenizerFast:
    """As of GPT-2, Llama 3 and Qwen, with merges of its own: line ends join, and so do words with the space before."""
    corpus = ["the model and the answer", "\n\n\n\n", "yes no yes no", "user assistant system", " the the", "hi there"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(corpus * 3, trainer)
    return _with(backend, template, **how)


def _letters(fallback: bool = True) -> models.BPE:
    words = ["<unk>", "<s>", "</s>", *(_BYTES if fallback else []), "▁", *map(chr, range(33, 127)), "\n"]
    vocabulary = {word: place for place, word in enumerate(words)}
    return models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=fallback, fuse_unk=True)


def _pieces() -> decoders.Decoder:
    replace = decoders.Replace("▁", " ")
    return decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def metaspace(template: str | None = None, *, fallback: bool = True, **how: bool) -> PreTrainedTokenizerFast:
    """As of transformers' own LlamaTokenizer: a space before the first word of a text, and of no other."""
    backend = Tokenizer(_letters(fallback))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = _pieces()
    return _with(backend, template, **how)


def prepend(template: str | None = None, **how: bool) -> PreTrainedTokenizerFast:
    """As of Llama 2, TinyLlama, Zephyr, Phi-3: a space before every stretch between special tokens."""
    backend = Tokenizer(_letters())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = _pieces()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _with(backend, template, **how)


KINDS = {"byte-level": byte_level, "metaspace": metaspace, "prepend": prepend}
