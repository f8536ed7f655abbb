"""What a judge has said, kept by content, so that it is not asked the same twice.

In:  a judge, and what it is to be asked. Out: verdicts, or the scores of a judge of single answers. What was said is
found by the judge's identity and the prompt with both answers in their order (or with the one answer); the judge is
asked for the rest, a part at a time, and each part is kept at once. A verdict that it did not give is asked for again.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kto_dist.base import disks
from kto_dist.base.keyed import Keyed
from kto_dist.evaluation.judges import VERDICTS, Comparison, Judge, ScoreJudge, Verdict


class Verdicts:
    """Of one judge."""

    def __init__(self, judge: Judge, folder: Path | None, say: Callable[[str], None]) -> None:
        """`folder`: of what is kept; None: nothing is."""
        self.judge, self.kept = judge, 0
        """`kept`: answers of the judge that were there."""
        self._folder, self._say = folder, say
        self._lines: Keyed | None = None
        if folder is not None and judge.identity is not None:
            self._lines = Keyed(folder / f"{hashlib.sha256(judge.identity.encode()).hexdigest()[:32]}.jsonl")

    def of(self, asked: Sequence[Comparison]) -> list[Verdict | None]:
        """Raises `UserError` where the judge cannot be asked."""
        contents = [(one.prompt, one.first, one.second) for one in asked]
        return self._all(contents, asked, self.judge, "verdict", lambda said: said in VERDICTS)

    def scores(self, judge: ScoreJudge, asked: Sequence[tuple[str, str]]) -> list[float]:
        """(prompt, answer) -> its score, each once. Raises `UserError`."""
        return self._all(
            asked,
            asked,
            lambda part: [judge.score(prompt, answer) for prompt, answer in part],
            "score",
            lambda said: isinstance(said, int | float),
        )

    def _all(
        self,
        contents: Sequence[tuple[str, ...]],
        asked: Sequence[Any],
        ask: Callable[[Sequence[Any]], Sequence[Any]],
        field: str,
        is_said: Callable[[Any], bool],
    ) -> list[Any]:
        keys = [_key(content) for content in contents]
        found: dict[str, Any] = {}
        if self._lines is not None:
            entries = {key: self._lines.get(key) for key in keys}
            found = {k: entry[field] for k, entry in entries.items() if entry and is_said(entry.get(field))}
        self.kept = len(found)
        lacking = {key: one for key, one in zip(keys, asked, strict=True) if key not in found}
        if self._lines is not None:
            self._say(f"judge ({self.judge.name}): {len(found):,} {field}s kept, {len(lacking):,} to ask for")
        waiting = list(lacking)
        size = self.judge.at_once or max(1, len(waiting))
        for start in range(0, len(waiting), size):
            part = waiting[start : start + size]
            said = list(ask([lacking[key] for key in part]))
            assert len(said) == len(part), f"{self.judge.name} gave {len(said)} {field}s"
            fresh = dict(zip(part, said, strict=True))
            found |= fresh
            self._keep({key: {field: value} for key, value in fresh.items() if is_said(value)})
        return [found[key] for key in keys]

    def _keep(self, fresh: dict[str, dict[str, Any]]) -> None:
        if self._lines is not None and self._folder is not None:
            with disks.refusals("what the judge said", "judge.cache", self._folder):
                self._lines.add(fresh)


def _key(content: Sequence[str]) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
