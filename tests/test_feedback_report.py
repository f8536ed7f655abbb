"""The page of an audit: self-contained, safe to open, legible on a phone, without private details."""

import re
import subprocess
import sys
import warnings
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import browser
import pytest
from audits import audited, crowd
from feedback_log import vote
from hypothesis import given
from hypothesis import strategies as st

from kto_dist.feedback.audit import Audit, File
from kto_dist.feedback.content import readable
from kto_dist.feedback.mask import excerpt, mask
from kto_dist.feedback.plots import PLOTS, RATIO, render
from kto_dist.feedback.report import page
from kto_dist.record.theme import LIGHT

SCRIPT = "<script>window.pwned=1;console.log('pwned')</script>"
HOSTILE = (
    SCRIPT,
    '"><img src=x onerror="window.pwned=1;console.log(\'pwned\')">',
    "</style></title>" + SCRIPT,
    "'; DROP TABLE votes; --",
    "{{ 7 * 7 }}{% for x in y %}",
    "$\\frac{1}$ _^{ 日本語 👍🏽 \u202e reversed",
    "W" * 300,
)


def hostile_audit() -> Audit:
    """Every string that comes from a log or a config is hostile, and disputed, so that samples show it."""
    votes = [
        vote(f"{text} answer", up, f"{text} {user}", prompt=f"{text} prompt", day=day, model=f"{text} model")
        for text in HOSTILE
        for day, (up, user) in enumerate([(True, "a"), (False, "b"), (True, "c"), (False, "d")])
    ]
    found = audited([*votes, *crowd()], users={"hash_ids": False})
    return replace(
        found,
        files=(File(name=SCRIPT, split=HOSTILE[1], rows=3, sha256="0" * 64),),
        settings={"output": {"folder": SCRIPT}, "input": {"files": list(HOSTILE)}},
    )


@pytest.fixture(scope="module")
def shown() -> str:
    return page(hostile_audit())


def test_every_plot_is_in_the_page_with_how_to_read_it(shown):
    assert shown.count("data:image/svg+xml;base64,") == 2 * len(PLOTS)  # light and dark
    for plot in PLOTS:
        assert f'id="{plot.name}"' in shown and plot.how_to_read.replace("'", "&#39;") in shown


@pytest.mark.parametrize("far", ["9999-12-31", "0001-01-01"])
def test_a_date_at_the_end_of_the_calendar_is_drawn(far):
    away = vote("far", True, "u1", prompt="when?")
    away["time"] = datetime.fromisoformat(far)
    found = audited([*crowd(), away])
    assert far[:4] in {found.drift.first[:4], found.drift.last[:4]}
    assert 'id="ratio"' in page(found)


@pytest.mark.parametrize("days", [2, 3, 5, 6, 30])
def test_a_log_of_few_days_is_drawn_without_a_warning(days):
    votes = [vote(f"a{n}", n % 3 > 0, f"u{n % 5}", prompt=f"q{n}", day=n % days) for n in range(60)]
    found = audited(votes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(RATIO, found, LIGHT)


def test_the_page_needs_nothing_from_elsewhere_and_has_no_script(shown):
    sources = re.findall(r"""<[^>]*\s(?:src|srcset|href)\s*=\s*["']?([^"'>\s]{0,30})""", shown)
    assert sources and all(source.startswith("data:") for source in sources)
    assert "<script" not in shown and "@import" not in shown and "url(" not in shown


def test_other_peoples_text_is_escaped(shown):
    assert shown.count("&lt;script&gt;window.pwned=1") >= 4
    assert "<img src=x" not in shown and "{{ 7 * 7 }}" in shown


def test_users_that_are_not_hashed_appear_by_number(shown):
    # `a` to `d` follow the hostile text in their ids, and no other text ends so
    assert not re.search(r"DROP TABLE votes; -- [abcd]\b", shown)
    assert "user 1" in shown


def test_the_page_is_light(shown):
    assert len(shown.encode()) < 1_000_000


@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.WHY_NOT)
@pytest.mark.parametrize("width", (360, 1200))
def test_in_a_browser_nothing_overflows_runs_or_fails(tmp_path, shown, width):
    (tmp_path / "report.html").write_text(shown, encoding="utf-8")
    seen = browser.look(tmp_path / "report.html", tmp_path, width)
    assert seen.visible == width and seen.needed <= width, seen.too_wide
    assert not seen.too_wide
    assert seen.loaded == seen.pictures == len(PLOTS)
    assert not seen.pwned and not seen.console


@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.WHY_NOT)
def test_the_browser_would_have_noticed(tmp_path):
    (tmp_path / "bad.html").write_text(f'<p style="width: 500px">wide</p><img src="data:,no">{SCRIPT}')
    seen = browser.look(tmp_path / "bad.html", tmp_path)
    assert seen.needed > seen.visible and seen.too_wide and seen.pwned and seen.console
    assert (seen.pictures, seen.loaded) == (1, 0)


@pytest.mark.parametrize(
    "text",
    [
        "anna@example.org",
        "first.last+tag@mail.example.co.uk",
        "anna%40example.org",
        "Jürgen@bücher.example",
        "+49 30 1234567",
        "(030) 123 45 67",
        "+1-212-555-0123",
        "0049 (0) 170 / 123 45 67",
        "4111 1111 1111 1111",
        "٠١٢٣٤٥٦٧٨٩",
        "o'brien@example.org",
        "030 — 123 — 4567",
        "030 − 123 ‒ 4567",
        "+49_30_1234567",
        "555,0123,456",
        "030,123,456",
    ],
)
def test_addresses_and_numbers_are_masked(text):
    for around in ("{}", "write to {}, please", "<{}>", "({})", "tel:{}"):
        masked = mask(around.format(text))
        # a bracket before a number may be part of it
        assert masked.replace("(", "") in {around.format(mark).replace("(", "") for mark in ("[e-mail]", "[phone]")}


@pytest.mark.parametrize(
    "text",
    [
        "in 2026",
        "1,234 users",
        "1,234,567 rows",
        "(12,345,678.50)",
        "1,234,567 - 2,345,678",
        "2024, 2025, 2026",
        "2026-01-05",
        "05.01.2026",
        "at 12:30",
        "3.14159",
        "@all",
    ],
)
def test_what_is_no_address_stays(text):
    assert mask(text) == text


@given(st.text(max_size=60), st.from_regex(r"[a-z]{1,8}@[a-z]{1,8}\.(org|com)", fullmatch=True), st.text(max_size=60))
def test_an_address_is_masked_wherever_it_stands(before, address, after):
    assert address not in mask(before + " " + address + " " + after)


@given(st.integers(1, 80))
def test_no_cut_leaves_part_of_an_address(length):
    shown = excerpt("x" * 40 + " anna.smith@example.org and 030 1234567 " + "y" * 40, length)
    assert "anna" not in shown and "0301" not in shown.replace(" ", "")
    assert len(shown) <= length + 1


def test_samples_are_masked():
    text, prompt = "call 030 1234567", "I am anna@example.org"
    votes = [vote(text, name == "a", name, prompt=prompt) for name in "ab"]
    sample = audited([*votes, *crowd()]).conflicts.samples[0]
    assert (sample.prompt, sample.completion) == ("I am [e-mail]", "call [phone]")


def test_messages_are_shown_as_people_read_them():
    assert readable('[{"role":"user","content":"hi"}]') == "hi"
    assert (
        readable('[{"role":"system","content":"be kind"},{"role":"user","content":"hi"}]')
        == "system: be kind\n\nuser: hi"
    )
    for text in ("[not json", "[1, 2]", "[]", "plain"):
        assert readable(text) == text


def test_the_audit_needs_no_torch_and_no_pyplot():
    code = (
        "import sys, kto_dist.feedback.audit, kto_dist.feedback.report, kto_dist.data.audited\n"
        "print(sorted({'torch', 'transformers', 'mlflow', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_screenshot_of_the_page_is_in_the_readme():
    root = Path(__file__).parents[1]
    picture = root / "docs" / "audit.png"
    assert "(docs/audit.png)" in (root / "README.md").read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000
