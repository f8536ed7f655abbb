"""What a run that goes on keeps of its logs: a damaged line costs itself alone, and is told."""

from typing import Any

import pytest

from kto_dist.record.run_folder import RunFolder, append_line, read_lines

MESSAGE = {"step": 2, "rule": "flat", "stop": False, "message": "it is flat"}
ANSWERS = {"step": 2, "answers": [{"prompt": "a", "answer": "b", "finished": True, "tokens": 3}]}


def names(value: Any) -> set[str]:
    """Of a line and all that is nested in it."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set(value if isinstance(value, dict) else ()).union(*map(names, parts))


@pytest.mark.parametrize(("name", "line"), [("health", MESSAGE), ("answers", ANSWERS)])
def test_no_flipped_bit_of_a_log_leaves_a_line_that_lacks_what_is_read_of_it(tmp_path, name, line):
    """One in a name leaves valid JSON: every further start of a run once ended with a `KeyError` over its past."""
    folder = RunFolder(tmp_path)
    path = getattr(folder, name)
    append_line(path, line)
    whole = path.read_bytes()
    for place in range(len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 3
        path.write_bytes(whole + damaged + whole)
        told = folder.begin("", step=9, last=False)
        kept = read_lines(path)
        assert kept[0] == kept[-1] == line and all(names(each) >= names(line) for each in kept)
        assert told == ([] if len(kept) == 3 else [f"1 lines of {path} could not be read, and are left out"])
