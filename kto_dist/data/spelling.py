"""Text -> tokens, always in its context, and back: whether the tokens spell the text.

In:  texts in which `MARK` stands for a turn mark that somebody typed.
Out: token ids, in which such marks are spelled in ordinary tokens.

Tokenizers have context. Those that add a space at the start (Metaspace, the normaliser Prepend) would add one to an
answer that is tokenised apart, and others merge what stands on both sides of the seam. So a conversation is tokenised
as a whole and cut afterwards.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from kto_dist.base.errors import UserError
from kto_dist.data.template import MARK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
_PROBE = "The 1st line, then\nanother one."


class Speller:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        self._typed: dict[str, Ids] = {"": []}
        probe, plain = self.ids(["a"], special=True)[0], self.ids(["a"])[0]
        self._adds_bos = probe[:1] == [tokenizer.bos_token_id]
        # a vocabulary without Latin letters may drop them, and leave special tokens alone, or nothing
        alone = not plain and not self._adds_bos
        self._adds_eos = (len(probe) > 1 or alone) and probe[-1:] == [tokenizer.eos_token_id]
        self.can_spell = bare(self.decoded(self.ids([_PROBE]))[0]) == bare(_PROBE)
        """Whether this tokenizer's tokens lead back to their text at all."""

    def ids(self, texts: Sequence[str], *, special: bool = False, typed: Sequence[Sequence[str]] = ()) -> list[Ids]:
        """`typed`: for each text what its `MARK`s stand for. Raises `UserError` where a slow tokenizer meets one."""
        marked = {place for place, marks in enumerate(typed) if marks}
        plain = [text for place, text in enumerate(texts) if place not in marked]
        ids: list[Ids] = []
        if plain:
            # verbose=False: rows above the tokenizer's own length limit are cut later, not a reason to warn.
            found = self.tokenizer(plain, add_special_tokens=special, return_attention_mask=False, verbose=False)
            ids = list(found["input_ids"])
        for place in sorted(marked):
            ids.insert(place, self._spelled(texts[place], typed[place]))
        return ids

    def opened(self, ids: Ids) -> Ids:
        """A text's tokens with special ones, without the EOS that the tokenizer added, or a BOS beside the text's."""
        ids = ids[:-1] if self._adds_eos else ids
        return ids[1:] if self._adds_bos and ids[:2] == [self.tokenizer.bos_token_id] * 2 else ids

    def without_bos(self, ids: Ids, text: str) -> Ids:
        """The tokens of the text alone."""
        bos = self.tokenizer.bos_token
        added = self._adds_bos and ids[:1] == [self.tokenizer.bos_token_id] and not text.startswith(str(bos))
        return ids[1:] if added else ids

    def decoded(self, ids: Sequence[Ids]) -> list[str]:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return list(backend.decode_batch(list(ids), skip_special_tokens=False))
        return [
            str(self.tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            for row in ids
        ]

    def spells(self, ids: Sequence[Ids], texts: Sequence[str]) -> list[bool]:
        """Whether the ids say what the text says, spaces and letters' cases and forms apart."""
        if not self.can_spell:
            return [True] * len(texts)
        return [
            bare(found) == bare(text) or _alike(found) == _alike(text)
            for found, text in zip(self.decoded(ids), texts, strict=True)
        ]

    def _spelled(self, text: str, marks: Sequence[str]) -> Ids:
        """Of a text with `MARK`s: what is between them keeps its own tokens, special ones included."""
        first, *others = text.split(MARK)
        ids = list(self.ids([first])[0]) if first else []
        for mark, following in zip(marks, others, strict=True):
            ids += self._as_text(mark)
            ids += self._inside(following, lambda piece: self.ids([piece])[0]) if following else []
        return ids

    def _as_text(self, mark: str) -> Ids:
        """A mark in ordinary tokens, and in others than the template's."""
        if mark not in self._typed:
            added = self.tokenizer.added_tokens_encoder
            ids = self._inside(mark, self._without_added)
            # a mark that is no token has ordinary ones in the template too; of another one, the model may have a word
            # of its own: its halves are none
            if mark not in added or {*map(self.tokenizer.convert_tokens_to_ids, added)} & {*ids}:
                ids = [token for half in _halves(mark) for token in self._inside(half, self._without_added)]
            self._typed[mark] = ids
        return self._typed[mark]

    def _inside(self, text: str, encode: Callable[[str], Ids]) -> Ids:
        """As in the middle of a text: after a newline no tokenizer adds the space that it adds at a text's start."""
        newline, whole = encode("\n"), encode("\n" + text)
        return whole[len(newline) :] if whole[: len(newline)] == newline else encode(text)

    def _without_added(self, text: str) -> Ids:
        """Without looking for added tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "somebody typed turn marks into a message, and this tokenizer, which is no fast one, reads them as "
                "real ones: use a fast tokenizer, or take the marks out of the messages"
            )
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        return [token.id for word in words for token in backend.model.tokenize(word)]


def common_prefix(one: Ids, other: Ids) -> int:
    """How many tokens both start with."""
    if other[: len(one)] == one:
        return len(one)
    return next(place for place, (a, b) in enumerate(zip([*one, -1], [*other, -2], strict=False)) if a != b)


def restored(text: str, marks: Iterable[str]) -> str:
    """A text with what its `MARK`s stand for."""
    first, *others = text.split(MARK)
    return first + "".join(mark + other for mark, other in zip(marks, others, strict=False))


def bare(text: str) -> str:
    """Without white space, and without what some tokenizers write for a space."""
    return "".join(text.replace("▁", " ").split())


def _halves(mark: str) -> tuple[str, str]:
    return mark[: len(mark) // 2], mark[len(mark) // 2 :]


def _alike(text: str) -> str:
    return bare(unicodedata.normalize("NFKC", text).casefold())
