"""Text from a run: the cache, the choice of a token, where a text ends, what is printed, and the page.

That generation equals a loop without a cache, for every gate and mode: test_model.py."""
import math
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tokenizers
import torch

from configurator import ConfigError
from conftest import go, snapshot, tiny
from sample import COLUMNS, generate, new_cache, next_token, page
from test_routing import FAMILIES, both_families, context_of, make, tokens

RUN, BACKBONE = "out/tiny/g3_full_aux/seed0", "out/tiny/backbone/seed0"
TEXT = "the naïve “木” is\nempty 🙂 …"


# -----------------------------------------------------------------------------
# the cache, and generation

@both_families
def test_the_cache_holds_the_heads_of_keys_in_the_dtype_of_attention_and_gives_views(family):
    model, heads = make(family=family), FAMILIES[family].get("n_kv_head", 2)
    cache, new = new_cache(model, batch=3), torch.full((3, heads, 1, 8), 5.0, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens(model, 3, 9), "full", cache=cache)
    k, v = cache[0].extend(new, new + 1)
    assert k.dtype == v.dtype == torch.bfloat16 and k.shape == v.shape == (3, heads, 10, 8)
    assert torch.equal(k[:, :, 9:], new) and torch.equal(v[:, :, 9:], new + 1)
    assert cache[0].extend(new, new)[0].data_ptr() == k.data_ptr()
    assert [layer.length for layer in cache] == [11, 9, 9, 9]


@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["threshold", "full", "cheap", "adapter"])
@pytest.mark.parametrize("prompt", [1, 7])
def test_generation_goes_on_past_the_smallest_contexts(block_size, mode, prompt):
    model = make(block_size=block_size, n_embd=8)
    model.calibrate(context_of(tokens(model, 9, seed=5)))
    idx = tokens(model, 1, prompt)
    text, window, read = idx[0].tolist(), [], []
    while len(read) < prompt + 12:
        if len(window) == block_size:  # full: the last half, the new token included
            window = text[:len(read)][len(read) + 1 - max(1, block_size // 2):]
        window.append(text[len(read)])
        logits, routes = model(torch.tensor([window]), mode)
        read.append((window[-1], [bool(r.mask[0, -1]) for r in routes]))
        if len(read) == len(text):
            text.append(logits[0, -1].argmax().item())
    assert list(generate(model, idx, 12, mode, temperature=0)) == read


def test_generation_ends_before_the_end_of_text_and_draws_no_id_beyond_the_vocabulary():
    model = make()
    drawn = [token for token, _ in generate(model, tokens(model, 1, 5), 60, "full", temperature=0)][5:]
    end = drawn[3]
    ended = [token for token, _ in generate(model, tokens(model, 1, 5), 60, "full", temperature=0, eot_token=end)][5:]
    assert ended == drawn[:drawn.index(end)]
    for temperature in (0, 1e-300, 5.0):
        some = [token for token, _ in generate(model, torch.tensor([[39]]), 60, "full", temperature, vocab_size=7)]
        assert some[0] == 39 and max(some[1:]) < 7  # a prompt's ids are its own


def allowed(logits, temperature, top_k, top_p):
    """{id: probability} of what may be drawn, in plain Python."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:(top_k or None) if temperature else 1]
    weights = {i: math.exp((logits[i] - max(logits)) / (temperature or 1)) for i in order}
    total, enough = sum(weights.values()), {}
    for i in order:
        if sum(enough.values()) < top_p * total:
            enough[i] = weights[i]
    return {i: weight / sum(enough.values()) for i, weight in enough.items()}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 1, 1.0), (0, 3, 1.0), (1.0, 0, 0.6), (1.0, 0, 1e-6),
    (1.5, 4, 0.7), (1.0, 99, 0.9)])
def test_tokens_are_drawn_as_often_as_they_should(temperature, top_k, top_p):
    logits = [0.3, 2.0, -1.0, 1.4, 0.9, -0.2]
    expected = allowed(logits, temperature, top_k, top_p)
    generator, n = torch.Generator().manual_seed(0), 4000
    drawn = Counter(next_token(torch.tensor(logits), temperature, top_k, top_p, generator) for _ in range(n))
    assert drawn.keys() <= expected.keys()
    for i, p in expected.items():
        assert abs(drawn[i] / n - p) < 4 * math.sqrt(p * (1 - p) / n) + 1e-9


# -----------------------------------------------------------------------------
# the script

def test_a_text_alone_is_shown_with_its_depths(done):
    before = snapshot(RUN)
    text, digits, _, realised, *_ = go("sample", RUN, f"--prompt={TEXT}", "--max_new_tokens=0").split("\n")
    assert text == TEXT.replace("\n", " ") and re.fullmatch(f"[012]{{{len(TEXT)}}}", digits)
    Path("story.txt").write_text(TEXT, encoding="utf-8")
    assert digits in go("sample", RUN, "--prompt_file=story.txt", "--max_new_tokens=0")
    assert re.fullmatch(r"full at \d\.\d\d of 2 controlled layers a token, on average", realised)
    assert snapshot(RUN) == before


@pytest.mark.parametrize("words", [[], ["--mode=full"], ["--mode=cheap", "--top_k=0"], ["--temperature=0"]], ids=str)
def test_the_same_command_gives_the_same_text_and_says_its_speed_apart(words, done, capsys):
    words = [RUN, f"--prompt={TEXT}", "--max_new_tokens=40", *words]
    assert go("sample", *words).startswith(TEXT) and go("sample", *words) == go("sample", *words)
    assert re.search(r"40 tokens, [\d.]+ a second|the model ended the text", capsys.readouterr().err)


def test_every_token_is_full_at_budget_1_and_none_at_0(done):
    for budget, depth in ((1, "2.00"), (0, "0.00")):
        out = go("sample", RUN, "--max_new_tokens=30", f"--budget={budget}")
        assert f"full at {depth} of 2" in out and "the budget asks for" not in out


def test_a_text_that_misses_the_budget_is_named(done):
    checkpoint = torch.load(f"{RUN}/ckpt.pt")
    for name in ("h.1.threshold", "h.2.threshold"):
        checkpoint["model"][name].fill_(-math.inf)  # every token goes full
    torch.save(checkpoint, f"{RUN}/ckpt.pt")
    assert "the budget asks for 1.00" in go("sample", RUN, f"--prompt={TEXT}", "--max_new_tokens=0")
    assert "the budget asks" not in go("sample", RUN, "--prompt=short", "--max_new_tokens=0")


def test_the_end_of_text_in_a_prompt_is_one_token_and_an_empty_prompt_is_that(done):
    for prompt in ("", "<|endoftext|>"):
        go("sample", RUN, f"--prompt={prompt}", "--max_new_tokens=0", "--view=a.html", "--overwrite")
        assert [text for text, _ in Page(Path("a.html").read_text()).tokens] == ["<|endoftext|>"]


def test_a_copied_out_needs_no_data_and_no_folder_of_its_own(done, tmp_path, monkeypatch):
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer, own.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    own.train_from_iterator([], tokenizers.trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    (done / "mine").mkdir()
    own.save("mine/tokenizer.json")
    Path("story.txt").write_text(f"{TEXT} " * 300, encoding="utf-8")
    go("prepare", "--source=story.txt", "--name=story", "--tokenizer=hf:mine")
    go("train", *tiny("--dataset=story", "--scale=story"))
    before = [go("sample", run, f"--prompt={TEXT}", "--temperature=0") for run in (RUN, RUN.replace("tiny", "story"))]
    (done / "out").rename(tmp_path / "moved")
    shutil.rmtree(done)
    monkeypatch.chdir(tmp_path)
    moved = [f"moved/{scale}/g3_full_aux/seed0" for scale in ("tiny", "story")]
    assert [go("sample", run, f"--prompt={TEXT}", "--temperature=0") for run in moved] == before
    with pytest.raises(ConfigError, match="data/tiny does not exist"):
        go("sample", moved[0], "--budget=0.25")


def test_a_backbone_has_one_mode(done):
    out = go("sample", BACKBONE, "--max_new_tokens=5")
    assert out.startswith("The ") and "full at" not in out
    assert go("sample", BACKBONE, "--max_new_tokens=5", "--mode=full") == out


@pytest.mark.parametrize("words, message", [
    ("", "name the folder of a run"), ("--prompt=a", "name the folder"), ("nowhere", "nowhere/ckpt.pt does not"),
    ("{run} --mode=topk", "generates under threshold"), ("{run} --top_k=-1", "0 or more"), ("{run} --top_p=0", "a share"),
    ("{run} --temperature=-1", "0 or more"), ("{run} --budget=-0.5", r"in \[0, 1\]"), ("{run} --device=tpu", "cuda"),
    ("{run} --dtype=half", "bfloat16"), ("{run} --prompt_file=no.txt", "--prompt_file=no.txt cannot be read"),
    ("{run} --prompt=a\udcff", "--prompt cannot be read.*UTF-8"), ("{run} --prompt=a --prompt_file=b", "either"),
    ("{run} --view=a.png", "an .html file"), ("{run} --view=nowhere/a.html", "folder that exists"),
    ("{run} --view=texts.html", "--overwrite"), ("{run} --view=a.html --mode=cheap", "nothing routes"),
    ("{backbone} --mode=cheap", "under full only"), ("{backbone} --budget=0.5", "nothing routes"),
    ("{run} --promt=a", "did you mean 'prompt'"), ("{run} --plugin=no.py", "no file of Python")])
def test_what_a_user_gets_wrong_is_one_line(words, message, done):
    Path("texts.html").symlink_to("precious.html")
    with pytest.raises(ConfigError, match=message) as error:
        go("sample", *words.format(run=RUN, backbone=BACKBONE).split())
    assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# the page

class Page(HTMLParser):
    """The tokens of a page [(text, its attributes)], and the number of dark cells of each row."""

    def __init__(self, text):
        super().__init__()
        self.tokens, self.rows, self.inside = [], Counter(), None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.inside = tag
        if tag == "span" and attrs["class"] != "key":
            self.tokens.append(["", attrs])
        if tag == "path":
            self.rows.update(int(y) // 10 for y in re.findall(r"M\d+ (\d+)", attrs["d"]))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "span" and self.tokens:
            self.tokens[-1][0] += data


def test_a_page_holds_the_text_and_depth_of_every_token_and_every_decision():
    pieces = ["The", " <b>&", ' "quick"', "\n", "", "木"] * 40
    masks = [[i % 2 == 0, i % 3 == 0, i % 5 == 0] for i in range(len(pieces))]
    shown = Page(page("title & all", pieces, masks, (1, 2, 7), 4))
    assert [text for text, _ in shown.tokens] == pieces
    assert [attrs["class"].split()[:1] == ["prompt"] for _, attrs in shown.tokens[:6]] == [True] * 4 + [False] * 2
    for piece, mask, (_, attrs) in zip(pieces, masks, shown.tokens):
        assert attrs["style"].endswith(f"/ {sum(mask) / 3:.0%})")
        assert attrs["title"] == f"{piece!r} full at: " + (", ".join(
            str(layer) for layer, full in zip((1, 2, 7), mask) if full) or "none")
    assert shown.rows == {n: sum(mask[n] for mask in masks) for n in range(3)} and len(pieces) > COLUMNS


def test_a_sample_writes_its_page(done):
    out = go("sample", RUN, f"--prompt={TEXT}", "--max_new_tokens=30", "--view=a.html")
    shown = Page(Path("a.html").read_text(encoding="utf-8"))
    assert "".join(text for text, _ in shown.tokens) == out.rpartition("\n\n")[0] and "wrote a.html" in out
    prompt = [text for text, attrs in shown.tokens if "prompt" in attrs["class"]]
    assert "".join(prompt) == TEXT and len(prompt) == len(TEXT.encode())
