"""Text from a run, and the pictures of its routing."""
import html
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configurator import ConfigError
from conftest import go, snapshot
from model import GPT, GPTConfig
from runs.view import WIDTH, lines_of, page_line, visible, write_view
from sample import generate

RUN = "out/tiny/g3_full_aux/seed0"
PIECES = ["The", " <b>", " quick", "\n", "f", "ox"]
MASKS = [[True, False], [False, False], [True, True], [False, False], [False, True], [True, False]]


# -----------------------------------------------------------------------------
# text

@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["threshold", "full"])
def test_generation_goes_on_past_the_smallest_contexts(block_size, mode):
    torch.manual_seed(0)
    config = GPTConfig(block_size=block_size, vocab_size=11, n_layer=3, n_head=2, n_embd=8, controlled=(1, 2))
    model = GPT(config)
    for p in model.parameters():  # what depends on the context must show in the token
        torch.nn.init.normal_(p, std=0.3)
    text, context = [4], [4]
    for _ in range(12):
        logits, _ = model(torch.tensor([context]), mode, torch.zeros(1, dtype=torch.int64))
        text.append(int(logits[0, -1].argmax()))
        context.append(text[-1])
        if len(context) > block_size:
            context = text[-max(1, block_size // 2):]
    tokens, masks = zip(*generate(model, torch.tensor([[4]]), 12, mode, temperature=0))
    assert list(tokens) == text
    assert all(len(mask) == (2 if mode == "threshold" else 0) for mask in masks)


def test_a_run_prints_text_with_its_routing_and_is_left_as_it_was(done):
    before = snapshot(RUN, times=True)
    out = go("sample", RUN, "--prompt=the naïve 木", "--max_new_tokens=20")
    text, digits = out.split("\n")[:2]
    assert text.startswith("the na") and len(digits) == len(text) and set(digits) <= set("012")
    assert snapshot(RUN, times=True) == before


WORDS = ["--mode=full", "--mode=cheap", "--budget=0.25", "--temperature=0", "--top_k=3"]


@pytest.mark.parametrize("word", WORDS)
def test_the_same_command_gives_the_same_text(word, done):
    words = [RUN, "--prompt=the", "--max_new_tokens=30", word]
    assert go("sample", *words) == go("sample", *words) != ""


def test_every_token_is_full_at_budget_1_and_none_at_0(done):
    for budget, depth in ((1, "2"), (0, "0")):
        out = go("sample", RUN, "--prompt=the", "--max_new_tokens=8", f"--budget={budget}")
        assert f"full at {depth}.00 of 2" in out


def test_a_backbone_has_one_mode(done):
    backbone = "out/tiny/backbone/seed0"
    assert go("sample", backbone, "--prompt=the", "--max_new_tokens=5").startswith("the")
    assert go("sample", backbone, "--prompt=the", "--max_new_tokens=5", "--mode=full").startswith("the")
    refused = {"--mode=cheap": "no gates and always runs full", "--budget=0.5": "nothing routes",
               "--view=a.html": "nothing routes"}
    for word, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            go("sample", backbone, "--prompt=the", word)


# -----------------------------------------------------------------------------
# pictures

def test_a_page_shows_every_token_and_every_decision(tmp_path):
    write_view(str(tmp_path / "a.html"), "title & all", PIECES, MASKS, (1, 2), 2)
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<h1>title &amp; all</h1>" in page
    letters = re.findall(r'<td class="text[^>]*>([^<]*)', page)
    assert [html.unescape(letter) for letter in letters] == ["The", " <b>", " quick", "↵", "f", "ox"]
    assert len(re.findall('class="text prompt"', page)) == 2
    for n, layer in enumerate((1, 2)):
        row = re.search(rf"<th>layer {layer}(.*)", page)[1]
        assert ["full" in cell for cell in re.findall("<td[^>]*>", row)] == [mask[n] for mask in MASKS]
    assert "42% of the decisions" in page and "33% to 50%" in page


def test_letters_and_cells_of_a_line_stand_in_the_same_columns():
    rows = page_line(range(1, 5), PIECES, MASKS, (1, 2), 0).split("\n")
    assert [row.count("<td") for row in rows] == [4, 4, 4]


def test_a_picture_is_written_for_any_text(tmp_path):
    pieces = ["$x_{", "\ufffd", "木", "\x00", "\t", "\u0301", "$", "a" * 100] * 5
    write_view(str(tmp_path / "a.png"), "100% of $x$", pieces, [[True, False]] * len(pieces), (1, 2), 1)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_sample_writes_both_and_only_a_png_needs_matplotlib(done, monkeypatch):
    words = [RUN, "--prompt=the", "--max_new_tokens=3"]
    go("sample", *words, "--view=a.png")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    go("sample", *words, "--view=a.html")
    assert Path("a.html").read_text(encoding="utf-8").count('class="text') == 6
    with pytest.raises(ConfigError, match="b.png.*needs matplotlib"):
        go("sample", *words, "--view=b.png")


@pytest.mark.parametrize("view, message", [("a.pdf", "must end in"), ("nowhere/a.html", "the folder nowhere"),
                                           ("a.html", "exists already")])
def test_a_view_that_cannot_be_written_is_refused_before_any_text(view, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.html").symlink_to("precious.html")
    with pytest.raises(ConfigError, match=message):
        go("sample", "no_run_is_read_yet", f"--view={view}")


@given(st.lists(st.text(alphabet="ab \n", min_size=1, max_size=12), min_size=1, max_size=200))
def test_lines_hold_every_token_once_and_fit(pieces):
    lines = lines_of(pieces, 20)
    assert [i for line in lines for i in line] == list(range(len(pieces)))
    assert all(len(line) for line in lines)
    for line in lines:
        length = sum(len(pieces[i]) for i in line if not pieces[i].isspace())
        assert length <= 20 or len(line) == 1


def test_lines_end_between_words():
    text = "one iterator " * 20
    lines = ["".join(text[i] for i in line) for line in lines_of(text)]
    assert all(line.endswith(" ") and len(line) <= WIDTH + 1 for line in lines)
    assert {line.split()[0] for line in lines} <= {"one", "iterator"}


def test_what_no_font_has_shows_as_a_mark_of_the_same_length():
    assert visible("a\n\tb\x00\u200b") == "a↵⇥b··"
