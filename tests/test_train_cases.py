"""Rows as people have them, with made-up content: what `train` learns of each, or the error that says what to do.

`cases/train/cases.jsonl`, a line a case: `rows`; `right`, the prompt, what is trained on and the label of each row as
the tokens spell them, or `error`, what the error says; `said`, what the summary says; `marks`, how many real turn marks
the prompt has. Messages go through the template of Qwen 2.5, or the one that the case names.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("trl")
from spellers import TEMPLATES, byte_level

from kto_dist.base.errors import UserError
from kto_dist.data.config import DataConfig
from kto_dist.data.examples import load
from kto_dist.data.tokenise import prepare

FILE = Path(__file__).parent / "cases" / "train" / "cases.jsonl"
CASES = {case["name"]: case for case in map(json.loads, FILE.read_text(encoding="utf-8").splitlines())}
OWN = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}


def tokenizer_of(case):
    name = case.get("template", "qwen2_5")
    if name == "zephyr":  # whose marks are no tokens
        plain = byte_level()
        plain.chat_template = OWN[name]
        return plain
    return byte_level(OWN.get(name) or TEMPLATES[name])


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_learned_as_what_it_says_or_refused(tmp_path, name):
    case = CASES[name]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in case["rows"]), encoding="utf-8")
    settings = {key: case[key] for key in ("columns", "on_bad_row") if key in case}
    config = DataConfig(train=str(log), cache=str(tmp_path / "cache"), workers=1, **settings)
    tokenizer = tokenizer_of(case)
    if case["right"] is None:
        with pytest.raises(UserError) as mistake:
            prepare(config, tokenizer)
        assert all(part in str(mistake.value) for part in case["error"]), mistake.value
        return
    examples = load(prepare(config, tokenizer)[0])

    def spelled(ids):
        return tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    found = [
        {
            "prompt": spelled(examples.prompt(row)),
            "trained_on": spelled(examples.completion(row)),
            "label": bool(examples.desirable[row]),
        }
        for row in range(len(examples))
    ]
    assert found == case["right"]
    noticed = examples.report.noticed()
    assert len(noticed) == len(case["said"]) and all(any(part in line for line in noticed) for part in case["said"]), (
        noticed
    )
    if "marks" in case:
        tokens = Counter(tokenizer.convert_ids_to_tokens(examples.prompt(0).tolist()))
        assert {mark: tokens[mark] for mark in case["marks"]} == case["marks"]
