"""Text to tokens: what prepare.py leaves on disk, and how training reads it."""
import ast
import gzip
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tokenizers
import torch

import prepare
import encoding
from configurator import ConfigError
from prepare import SPLITS

HERE = Path(prepare.__file__).parent
WORDS = "the iterator returns a value and raises naïve 木 Ωmega when it is empty or 🙂 … “quoted” é".split()


def make_documents(seed, count=300, length=30):
    """Distinct short texts."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(8, length))) for i in range(count)]


@pytest.fixture(scope="module")
def documents():
    return make_documents(0)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory, and waits that do not wait."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "RETRY_WAITS", (0, 0, 0))
    return tmp_path


@pytest.fixture
def by_document(monkeypatch):
    """Few and short documents are split by their hash too."""
    monkeypatch.setattr(prepare, "FEW_DOCUMENTS", 1)
    monkeypatch.setattr(prepare, "FEW_TOKENS", 1)
    monkeypatch.setattr(prepare, "HELD_OUT_ELSE", 0.1)


def write_jsonl(path, texts, column="text"):
    Path(path).write_text("".join(json.dumps({column: text}) + "\n" for text in texts))


def make(texts, name="mine", **options):
    """Prepare local texts -> their folder."""
    write_jsonl(f"{name}.jsonl", texts)
    return make_from(f"{name}.jsonl", name, **options)


def make_from(source, name="mine", **options):
    prepare.prepare(source, name, **{"tokenizer_name": "bytes", **options})
    check_meta(Path("data", name))
    return Path("data", name)


def meta_of(folder):
    return json.loads(Path(folder, "meta.json").read_text())


def tokens(folder, split):
    return np.fromfile(Path(folder, f"{split}.bin"), meta_of(folder)["dtype"])


def bins(folder):
    return [Path(folder, f"{split}.bin").read_bytes() for split in SPLITS]


def read(folder, *splits):
    """The documents of some splits, or of all in a row, decoded."""
    meta = meta_of(folder)
    ids = np.concatenate([tokens(folder, split) for split in splits or SPLITS])
    *texts, rest = np.split(ids, np.flatnonzero(ids == meta["eot_token"]) + 1)
    assert len(rest) == 0  # the last one ends with end-of-text too
    enc = encoding.load_tokenizer(meta, folder)
    return [enc.decode(text[:-1].tolist()) for text in texts]


def check_meta(folder):
    """What meta.json says is true -> the meta."""
    meta = meta_of(folder)
    for split, facts in meta["splits"].items():
        ids = tokens(folder, split)
        assert facts["tokens"] == len(ids) and facts["documents"] == (ids == meta["eot_token"]).sum()
        assert facts["sha256"] == hashlib.sha256(Path(folder, f"{split}.bin").read_bytes()).hexdigest()
        assert ids.max() < meta["vocab_size"]
    kept = sum(facts["documents"] for facts in meta["splits"].values())
    assert sum(meta["read"].values()) == kept + sum(meta["dropped"].values())
    assert not list(Path("data").glob(".*"))
    return meta


def raising(error):
    def fail(*args, **options):
        raise error
    return fail


# -----------------------------------------------------------------------------
# tokenizers

EOT = "<|endoftext|>"
SPECIALS = [EOT, "<|im_start|>"]


def byte_level(folder, texts=(), vocab_size=400, added=SPECIALS):
    """Save a small byte-level BPE as a tokenizer.json -> `tokenizers`' own object, its special tokens off."""
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=added, initial_alphabet=alphabet, show_progress=False))
    os.makedirs(folder, exist_ok=True)
    own.enable_truncation(50)
    own.enable_padding(length=20)
    own.save(f"{folder}/tokenizer.json")
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True
    return own


@pytest.fixture(params=["bytes", "gpt2", "hf:own"])
def enc(request, documents):
    if request.param == "hf:own":
        byte_level("own", documents)
    try:
        return encoding.tokenizer(request.param)
    except ConfigError:
        pytest.skip("tiktoken cannot load the gpt2 vocabulary here")


TEXTS = ["plain", "é “quoted” 漢字 🙂", "naïve 木", "\r\n\t\x00", "e\u0301 \u200b \ufeff", "a" * 5000, " ", "",
         f"a{EOT}b", "<|im_start|>"]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:12]))
def test_any_text_comes_back_and_special_tokens_in_it_are_ordinary_text(enc, text):
    ids = enc.encode(text).tolist()
    assert enc.decode(ids) == text and enc.eot_token not in ids and max(ids, default=0) < enc.n_vocab
    if enc.name == "bytes":
        assert ids == list(text.encode())
    if enc.name == "hf:own":
        assert ids == byte_level("own", make_documents(0)).encode(text, add_special_tokens=False).ids


def test_in_a_prompt_end_of_text_is_the_token(enc):
    assert enc.encode_prompt(f"a{EOT}b") == [*enc.encode("a"), enc.eot_token, *enc.encode("b")]
    assert enc.encode_prompt(EOT) == [enc.eot_token] and enc.encode_prompt("") == []
    assert enc.decode(enc.encode_prompt(f"{EOT}é")) == f"{EOT}é"
    assert enc.eot_token not in enc.encode_prompt("<|im_start|>")


@pytest.mark.parametrize("text", TEXTS[1:5], ids=repr)
def test_every_token_has_its_piece_of_the_text_and_characters_stay_whole(enc, text):
    ids = enc.encode(text).tolist()
    pieces = encoding.decode_pieces(enc, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text and "\ufffd" not in pieces
    piece = enc.decoder()
    assert [piece(token) for token in ids] == pieces


def test_what_never_becomes_a_character_is_the_replacement_mark():
    enc = encoding.tokenizer("bytes")
    ids = [0xC3, 0xA9, 0xC3, 65, 0xF0, 0x9F]
    assert encoding.decode_pieces(enc, ids) == ["", "é", "", "\ufffdA", "", "\ufffd"]
    assert encoding.decode_pieces(enc, [0xC3, 256]) == ["", "\ufffd" + EOT]
    assert encoding.decode_pieces(enc, []) == []


@pytest.mark.parametrize("character, count", [(" ", 10**6), ("\n", 10**6), ("\t", 10**6), ("a", 300_000)])
def test_monstrous_runs_are_tokenized_in_seconds(enc, character, count):
    began, text = time.time(), character * count + "x"
    assert enc.decode(enc.encode(text).tolist()) == text
    assert time.time() - began < 10


def test_long_texts_have_the_tokens_that_they_have_whole(documents):
    text = "  \n\n".join(documents * 20)
    assert len(encoding.PARTS.findall(text)) > 5
    own = byte_level("own", documents)
    assert encoding.tokenizer("hf:own").encode(text).tolist() == own.encode(text, add_special_tokens=False).ids
    try:
        gpt2 = encoding.tokenizer("gpt2")
    except ConfigError:
        pytest.skip("tiktoken cannot load the gpt2 vocabulary here")
    import tiktoken
    assert gpt2.encode(text).tolist() == tiktoken.get_encoding("gpt2").encode_ordinary(text)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)


def test_bins_of_an_hf_tokenizer_are_its_ids_and_need_no_original(documents, by_document):
    texts = [*documents, f"special {EOT} and <|im_start|> " + "long " * 100]
    own = byte_level("own", texts)
    original = Path("own/tokenizer.json").read_bytes()
    folder = make(texts, tokenizer_name="hf:own")
    os.rename("own", "gone")
    for split in SPLITS:
        expected = []
        for text in texts:
            if prepare.split_of(hashlib.sha256(text.encode()).digest(), 0.1) == split:
                expected += [*own.encode(text, add_special_tokens=False).ids, own.token_to_id(EOT)]
        assert tokens(folder, split).tolist() == expected
    assert (folder / "tokenizer.json").read_bytes() == original
    assert meta_of(folder)["tokenizer"] == "hf:own" and meta_of(folder)["eot_text"] == EOT
    assert sorted(read(folder)) == sorted(texts)


@pytest.mark.parametrize("config, added, eot", [
    (None, SPECIALS, EOT), ({"eos_token": "<|im_start|>"}, SPECIALS, EOT),
    ({"eos_token": "<end>"}, ["</s>", "<end>"], "<end>"),
    ({"eos_token": {"content": "<end>"}}, ["<end>"], "<end>"),
    ({"eos_token": None}, ["<end>", "</s>"], "</s>"), (None, ["<end>"], None)])
def test_end_of_text_of_an_hf_tokenizer(config, added, eot):
    byte_level("own", added=added)
    if config:
        Path("own/tokenizer_config.json").write_text(json.dumps(config))
    if eot is None:
        with pytest.raises(ConfigError, match="hf:own has no end-of-text token"):
            encoding.tokenizer("hf:own")
    else:
        assert encoding.tokenizer("hf:own").encode_prompt(eot) == [added.index(eot)]


def test_a_tokenizer_that_is_not_byte_level_gives_its_pieces():
    own = tokenizers.Tokenizer(tokenizers.models.Unigram(
        [("<unk>", 0), ("</s>", 0), ("▁Hello", -1), ("▁wor", -2), ("ld", -2), ("▁", -5), ("<0xE6>", -9),
         *[(c, -6) for c in "Helowrd</s>"]], 0))
    own.pre_tokenizer, own.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    own.add_special_tokens(["</s>"])
    os.mkdir("own")
    own.save("own/tokenizer.json")
    enc = encoding.tokenizer("hf:own")
    assert encoding.decode_pieces(enc, enc.encode("Hello world").tolist()) == [" Hello", " wor", "ld"]
    assert enc.eot_token not in enc.encode("Hello</s> world") and enc.decode_bytes(6) == b"\xe6"


def test_a_large_vocabulary_takes_uint32(documents):
    byte_level("own")
    content = json.loads(Path("own/tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"unused{i}": 1000 + i for i in range(70_000)}
    content["added_tokens"][0]["id"] = content["model"]["vocab"][EOT] = 71_000
    Path("own/tokenizer.json").write_text(json.dumps(content))
    folder = make(documents, tokenizer_name="hf:own")
    data, meta = prepare.load_data("mine", 16)
    assert (meta["vocab_size"], meta["eot_token"], meta["dtype"]) == (71_001, 71_000, "uint32")
    assert data["train"].dtype == np.uint32 and data["train"].max() == 71_000 and read(folder) == documents


def test_a_tokenizer_that_cannot_be_had_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(OSError("offline,\nsadly")))
    os.mkdir("empty")
    for name, words in {"hf:some/name": "hf:some/name.*OSError: offline, sadly.*go online",
                        "hf:empty": "empty/tokenizer.json cannot be read.*name another",
                        "byte": "'byte' is unknown; did you mean 'bytes'"}.items():
        with pytest.raises(ConfigError, match=words):
            prepare.prepare(tokenizer_name=name)
    monkeypatch.setattr("tiktoken.get_encoding", raising(OSError("offline")))
    with pytest.raises(ConfigError, match="gpt2 vocabulary.*TIKTOKEN_CACHE_DIR"):
        encoding.tokenizer("gpt2")
    assert os.listdir() == ["empty"]


# -----------------------------------------------------------------------------
# local files

def zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def parquet(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)


def array(texts):
    return json.dumps([{"text": text} for text in texts], indent=1).encode()


KINDS = {
    "a.jsonl": lines, "a.ndjson": lines, "A.JSONL": lines, "lines.json": lines, "a.json": array,
    "a.jsonl.gz": lambda texts: gzip.compress(lines(texts)), "a.jsonl.zst": lambda texts: zstd(lines(texts)),
    "a.json.gz": lambda texts: gzip.compress(array(texts)),
    "bom.jsonl": lambda texts: b"\xef\xbb\xbf" + lines(texts),
}


@pytest.mark.parametrize("kind", [*KINDS, "parquet", "two files", "txt", "txt and md"])
def test_every_kind_of_file_gives_the_same_bins(kind, documents):
    texts = documents[:40]
    expected = bins(make(texts, name="expected"))
    os.mkdir("files")
    if kind in KINDS:
        Path("files", kind).write_bytes(KINDS[kind](texts))
    elif kind == "parquet":
        parquet("files/a.parquet", id=range(len(texts)), text=texts)
    elif kind == "two files":
        write_jsonl("files/a.jsonl", texts[:30])
        write_jsonl("files/b.json", texts[30:])
    for i, text in enumerate(texts if "txt" in kind else []):
        name, bom = f"{i:04}.{'md' if i % 2 and 'md' in kind else 'txt'}", "\ufeff" if i % 3 else ""
        Path("files", name).write_text(bom + text, encoding="utf-8")
    assert bins(make_from("files")) == expected
    assert bins(make_from("files/*", overwrite=True)) == expected


def test_a_folder_is_its_files_of_known_kinds_at_any_depth(documents):
    os.makedirs("br/[deep]")
    Path("br/notes.rst").write_text("no data")
    names = ["a.jsonl", "[a].jsonl", "b [1].jsonl", "c?.jsonl", "{e}.jsonl", "ï.jsonl", "[deep]/z.jsonl"]
    counts = {f"br/{name}": 10 + i for i, name in enumerate(names)}
    for i, name in enumerate(names):
        write_jsonl(f"br/{name}", documents[20 * i:20 * i + 10 + i])
    meta = meta_of(make_from("br"))
    assert meta["read"] == counts and meta["dropped"]["duplicate"] == 0
    assert meta_of(make_from("br/[a].jsonl", "alone"))["read"] == {"br/[a].jsonl": 11}


@pytest.mark.parametrize("source, words", [
    ("nowhere/*.txt", "no file"), ("br", "files that are not"), ("br/*.rst", "files that are not"),
    ("br/*", "files that are not")])
def test_files_of_one_known_kind_are_asked_for(source, words):
    os.mkdir("br")
    for name in ("a.jsonl", "b.txt", "c.rst"):
        Path("br", name).write_text("{}")
    with pytest.raises(ConfigError, match=f"{re.escape(source)}' matches {words}.*folder/"):
        make_from(source)


def test_the_column_of_the_text_can_be_named(documents):
    expected = bins(make(documents, name="expected"))
    write_jsonl("a.jsonl", documents, column="content")
    parquet("a.parquet", content=documents, text=list(range(len(documents))))
    for source in ("a.jsonl", "a.parquet"):
        assert bins(make_from(source, text_column="content", overwrite=True)) == expected
        with pytest.raises(ConfigError, match=f"{source} has no text.* 'contnt'.*content.*--text_column"):
            make_from(source, "other", text_column="contnt")
    with pytest.raises(ConfigError, match="a.parquet has no text in a column 'text'"):  # those are numbers
        make_from("a.parquet", "other")


def test_duplicates_nulls_and_empty_documents_are_dropped_and_counted(documents):
    clean = bins(make(documents, name="clean"))
    dirty = ["", None, *documents, documents[3], "", documents[3], documents[80], None]
    assert bins(make(dirty, name="dirty")) == clean
    assert meta_of("data/dirty")["dropped"] == {"empty": 4, "duplicate": 3, "leak": 0}
    parquet("a.parquet", text=dirty)
    assert bins(make_from("a.parquet")) == clean


def damaged_parquet(path):
    """Its footer is whole, its pages are not."""
    parquet(path, text=make_documents(1))
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:4] + bytes(2000) + data[2004:])


LINE = b'{"text": "one"}\n'
BROKEN = {
    "z.jsonl": [LINE + b'{"text": "a\n', b"[1]\n", b"[" * 100_000, LINE + b'{"text": "\xff\xfe"}\n',
                b'{"text": 5}\n'],
    "z.jsonl.gz": [LINE, gzip.compress(LINE * 1000)[:40]], "z.txt": [b"good \xff bad"],
    "z.parquet": [b"hello", damaged_parquet, lambda path: parquet(path, text=[1])],
}


@pytest.mark.parametrize("name, content", [(name, content) for name in BROKEN for content in BROKEN[name]],
                         ids=lambda value: value if isinstance(value, str) else "")
def test_a_broken_file_is_one_line_that_names_it_and_leaves_nothing(name, content, documents):
    os.mkdir("texts")
    if name == "z.parquet":
        parquet("texts/a.parquet", text=documents)
    elif name != "z.txt":
        write_jsonl("texts/a.jsonl", documents)
    if callable(content):
        content(f"texts/{name}")
    else:
        Path("texts", name).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        make_from("texts/*")
    assert f"texts/{name}" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir("data") == [] and sorted(os.listdir()) == ["data", "texts"]


def test_an_empty_file_gives_no_documents(documents):
    os.mkdir("br")
    Path("br/a.jsonl").touch()
    Path("br/b.jsonl.gz").write_bytes(gzip.compress(b""))
    write_jsonl("br/c.jsonl", documents)
    write_jsonl("br/d.jsonl", ["never reached"])
    meta = meta_of(make_from("br", tokens="4K"))
    assert 0 < meta["read"].pop("br/c.jsonl") < len(documents) and set(meta["read"].values()) == {0}


# -----------------------------------------------------------------------------
# the embedded text

@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    root = tmp_path_factory.mktemp("stdlib") / "data"
    prepare.prepare(workers=1, root=str(root))
    return root / "stdlib"


def test_stdlib_is_about_2_MB_and_the_same_in_every_process(stdlib):
    meta = check_meta(stdlib)
    assert 1e6 < sum(facts["tokens"] for facts in meta["splits"].values()) < 1e7
    assert meta["dropped"]["leak"] > 0 and meta["split"] == "by document"
    for split in ("val", "test"):
        assert 0.02 < meta["splits"][split]["tokens"] / meta["splits"]["train"]["tokens"] < 0.1
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, HERE / "prepare.py", "--workers=3"], check=True, env=environment)
    assert bins("data/stdlib") == bins(stdlib)


def test_no_64_byte_window_of_a_held_out_stdlib_document_is_in_training(stdlib):
    train = [text.encode() for text in read(stdlib, "train")]
    held_out = [text.encode() for text in read(stdlib, "val", "test")]
    windows = {text[i:i + 64] for text in held_out for i in range(len(text) - 63)}
    assert len(windows) > 10_000 and not set(train) & set(held_out)
    assert not any(text[i:i + 64] in windows for text in train for i in range(len(text) - 63))


def test_just_those_are_dropped_that_share_a_window_with_training():
    rng = random.Random(0)
    shared = [rng.randbytes(200).hex() for _ in range(20)]
    texts = []
    for i in range(400):
        text = rng.choice(shared)
        at, length = rng.randint(0, 300), rng.randint(50, 75)
        texts.append(f"{i} " + rng.randbytes(rng.randint(1, 60)).hex() + text[at:at + length])
    texts += [a[-40:] + b[:40] for a, b in zip(texts, texts[1:])]  # windows of no document
    splits = [prepare.split_of(hashlib.sha256(text.encode()).digest(), 0.2) for text in texts]

    def windows(text):
        return {text[i:i + 64] for i in range(len(text) - 63)}
    trained = set().union(*(windows(text) for text, split in zip(texts, splits) if split == "train"))
    expected = [t for t, split in zip(texts, splits) if split == "train" or not windows(t) & trained]
    assert 10 < len(texts) - len(expected) < 200
    assert prepare.drop_leaks(texts, 0.2) == (expected, len(texts) - len(expected))


BLOCKS = ["match x:\n case 1:", "if x:", "else:", "for x in y:", "while x:", "try:", "except x:", "else:",
          "finally:", "with x:", "async def f():", "class c:", "def f():"]


def test_docstrings_are_those_of_a_walk_over_the_whole_tree():
    """A function in each kind of block of Python, and in each of those blocks within a function."""
    text = "".join(f"{block}\n  def f():\n    '{block[:5]}{{0}}'\n" for block in BLOCKS)
    text = '"""module"""\n' + text + "def outer():\n" + "".join(f"  {line}\n" for line in text.splitlines())
    Path("module.py").write_text(text)
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    assert prepare.docstrings("module.py") == [ast.get_docstring(node) or "" for node in nodes]
    assert len(nodes) == 2 + 2 * (len(BLOCKS) + 3)


# -----------------------------------------------------------------------------
# the stream of fineweb-edu

def streaming(monkeypatch, texts, *failures, column="text"):
    """A stand-in for datasets.load_dataset, whose n-th stream breaks after failures[n] rows -> the rows that
    were read, for the test to look at."""
    rows_read, breaks = [], iter(failures)

    def stream(path, name, split, streaming):
        assert (path, name, split, streaming) == ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)
        stop = next(breaks, None)
        for i, text in enumerate(texts):
            if i == stop:
                raise ConnectionError("the line\nwent dead")
            rows_read.append(i)
            yield {column: text}
    monkeypatch.setattr(datasets, "load_dataset", stream)
    return rows_read


FINEWEB_CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""


def test_fineweb_edu_is_streamed_from_its_repository(documents, monkeypatch):
    """A folder with its layout and columns; `datasets` prefers it to the network."""
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache"))
    folder = Path(prepare.FINEWEB)
    for place in ("data/CC-MAIN-2013-20", "sample/10BT"):
        (folder / place).mkdir(parents=True)
    (folder / "README.md").write_text(FINEWEB_CARD)
    for i, texts in enumerate((documents[:50], documents[50:])):
        n = len(texts)
        parquet(folder / f"sample/10BT/00{i}_00000.parquet", text=texts, id=["<urn:uuid:1>"] * n,
                score=[3.1] * n)
    parquet(folder / "data/CC-MAIN-2013-20/train-0.parquet", text=["not of the sample"])
    prepare.prepare("fineweb-edu", tokens="1B", tokenizer_name="bytes")
    assert bins("data/fineweb-edu") == bins(make(documents))
    assert check_meta("data/fineweb-edu")["read"] == {prepare.FINEWEB: len(documents)}


def test_a_stream_is_not_read_far_past_the_count(monkeypatch):
    rows_read = streaming(monkeypatch, make_documents(2, 20_000))
    prepare.prepare("fineweb-edu", tokens="60K", tokenizer_name="bytes", workers=1)
    assert len(rows_read) < 3000


def test_a_stream_that_breaks_is_taken_up_where_it_broke(documents, monkeypatch, capsys):
    streaming(monkeypatch, documents, 70, 100, 50, 10, 200, 200, 200)  # at most three tries get no further
    prepare.prepare("fineweb-edu", tokenizer_name="bytes")
    assert bins("data/fineweb-edu") == bins(make(documents))
    assert capsys.readouterr().out.count("the stream broke after") == 7


def test_what_was_read_is_kept_when_a_stream_ends_for_good(documents, monkeypatch, capsys):
    streaming(monkeypatch, documents, *[130] * 9)
    prepare.prepare("fineweb-edu", tokenizer_name="bytes")
    out = capsys.readouterr().out
    assert "ended after 130 documents: ConnectionError: the line went dead; kept what was read" in out
    assert read("data/fineweb-edu") == documents[:130]


@pytest.mark.parametrize("failures, column, words", [
    ([0], "text", "fineweb-edu cannot be read.*the line went dead.*check the network"),
    ([1] * 9, "text", "gives 6 tokens, too few"), ([], "content", "no text in a column 'text'.*content")])
def test_a_stream_that_gives_nothing_of_use_leaves_nothing(failures, column, words, monkeypatch):
    rows_read = streaming(monkeypatch, ["short", "never read"], *failures, column=column)
    with pytest.raises(ConfigError, match=words):
        prepare.prepare("fineweb-edu", tokenizer_name="bytes")
    assert os.listdir("data") == [] and len(rows_read) <= 4


# -----------------------------------------------------------------------------
# splits

def test_a_split_follows_from_the_text_alone():
    texts = make_documents(5, 1500, 150)
    one = make(texts, "one", workers=1)
    shuffled = make(random.Random(1).sample(texts, len(texts)), "shuffled")
    assert bins(one) == bins(make(texts, "three", workers=3)) != bins(shuffled)
    assert meta_of(one)["split"] == "by document" and sorted(read(one)) == sorted(texts)
    for split in SPLITS:
        assert 5 < len(read(one, split)) and sorted(read(one, split)) == sorted(read(shuffled, split))


def test_every_set_of_documents_has_usable_splits():
    """Of documents whose hashes alone would leave none to test in half of the sets."""
    rng = np.random.default_rng(0)
    ways = set()
    for count, longest in [(200, 900)] * 1000 + [(1, 900), (998, 20_000), (3000, 900), (3000, 60)] * 5:
        lengths = {rng.bytes(32): int(rng.integers(20, longest)) for _ in range(count)}
        if rng.random() < 0.3:
            lengths[rng.bytes(32)] = 10 ** 7  # one that outweighs all others
        way, ranges = prepare.split_ranges(lengths, 0.01)
        ways.add((count, longest, way))
        total, taken = sum(lengths.values()), sorted(sum(ranges.values(), []))
        assert [start for start, _ in taken] == [0, *[end for _, end in taken[:-1]]] and taken[-1][1] == total
        for split in ("val", "test"):
            held = sum(end - start for start, end in ranges[split])
            assert held >= min(4096, int(0.05 * total)) and held < total / 5
    assert {way[:2] for way in ways if way[2] == "by document"} == {(3000, 900)}


def test_one_text_and_few_documents_are_split_by_position(documents):
    text = "\n".join(documents)
    Path("book.txt").write_text(text, encoding="utf-8")
    write_jsonl("few.jsonl", documents[:200])
    few = [i for document in documents[:200] for i in [*document.encode(), 256]]
    for source, ids in {"book.txt": [*text.encode(), 256], "few.jsonl": few}.items():
        make_from(source, overwrite=True)
        data, meta = prepare.load_data("mine", 256)
        assert meta["split"] == "by position"
        assert np.concatenate([data[split] for split in SPLITS]).tolist() == ids
        assert len(data["val"]) == len(data["test"]) == len(ids) // 20


def test_too_little_text_is_refused():
    with pytest.raises(ConfigError, match="mine.jsonl gives 6 tokens, too few"):
        make(["short"])
    assert os.listdir("data") == []
    make(["x" * 200])
    with pytest.raises(ConfigError, match="val.bin holds 10 tokens, fewer than block_size \\+ 1 = 17"):
        prepare.load_data("mine", 16)


@pytest.mark.parametrize("text, count", [("200M", 200_000_000), ("1.5k", 1500), ("2B", 2_000_000_000),
                                         ("123", 123), ("", math.inf)])
def test_counts_are_read(text, count):
    assert prepare.parse_count(text) == count
    with pytest.raises(ConfigError, match="--tokens=.*write 200M"):
        prepare.parse_count(f"-{text}")


def test_tokens_stops_at_the_count_without_moving_a_document(documents, by_document, monkeypatch, capsys):
    clock = iter(range(0, 10 ** 6, 3))
    whole = make(documents, "whole")
    monkeypatch.setattr(prepare, "time", SimpleNamespace(time=lambda: next(clock)))
    first = make(documents, "first", tokens="4K")
    assert re.search(r"0\.0M tokens, 0\.00M tokens/s, \d+ s left", capsys.readouterr().out)
    assert 4000 <= sum(len(tokens(first, split)) for split in SPLITS) < 4400
    assert all(b.startswith(a) for a, b in zip(bins(first), bins(whole)))


# -----------------------------------------------------------------------------
# the folder

def test_an_existing_folder_is_replaced_only_when_told_to(documents):
    old = bins(make(documents[::-1]))
    with pytest.raises(ConfigError, match="data/mine exists already.*--overwrite"):
        make(documents)
    with pytest.raises(ConfigError, match="mine.jsonl cannot be read"):
        Path("mine.jsonl").write_text('{"text": "a')
        make_from("mine.jsonl", overwrite=True)
    assert bins("data/mine") == old
    os.mkdir("data/.mine.part")  # what a killed one left
    Path("data/.mine.part/train.bin").write_bytes(b"old")
    assert bins(make(documents, overwrite=True)) == bins(make(documents, "other")) != old
    Path("data/mine/input.txt").write_text("the only copy")
    os.symlink("other", "data/link")
    Path("data/file").write_text("notes")
    for name in ("mine", "link", "file"):
        with pytest.raises(ConfigError, match=f"data/{name} is or holds something other than data"):
            make(documents, name, overwrite=True)
    assert Path("data/mine/input.txt").read_text() == "the only copy" and Path("data/link").is_symlink()


def test_an_interrupted_prepare_leaves_nothing(documents, monkeypatch):
    monkeypatch.setattr(prepare, "split_ranges", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        make(documents)
    assert os.listdir("data") == []
    os.rmdir("data")
    Path("data").write_text("no folder")
    with pytest.raises(ConfigError, match="cannot write data/mine"):
        make(documents)


@pytest.mark.parametrize("name", ["../mine", ".mine", "a/b", ""])
def test_a_plain_name_is_asked_for(name):
    with pytest.raises(ConfigError, match="not a plain folder name.*--name=NAME"):
        prepare.prepare("texts/*.jsonl", name)


# -----------------------------------------------------------------------------
# reading

def test_a_folder_that_was_made_here_is_read_without_hashing_it(documents, monkeypatch):
    folder = make(documents)
    monkeypatch.setattr(hashlib, "sha256", raising(AssertionError("that takes long")))
    data, meta = prepare.load_data("mine", 16)
    assert meta == meta_of(folder)
    assert all(np.array_equal(data[split], tokens(folder, split)) for split in SPLITS)


def test_data_that_is_missing_or_truncated_or_too_large_is_told(documents):
    for name, words in {"mine": "--source=FILES --name=mine", "fineweb-edu": "--source=fineweb-edu"}.items():
        with pytest.raises(ConfigError, match=f"data/{name} does not exist.*python prepare.py {words}"):
            prepare.load_data(name, 16)
    folder = make(documents)
    whole = bins(folder)[1]
    broken = {whole[:-2]: "truncated", b"": "truncated", b"\xff\xff" + whole[2:]: "beyond the vocabulary"}
    for content, words in broken.items():
        (folder / "val.bin").write_bytes(content)
        with pytest.raises(ConfigError, match=f"val.bin .*{words}.*make it again with python prepare.py"):
            prepare.load_data("mine", 16)


@pytest.mark.parametrize("content", [
    "[1]", "{", "", "[" * 100_000, {"tokenizer": None}, {"vocab_size": "257"}, {"vocab_size": True},
    {"dtype": "int32"}, {"splits": []}, {"splits": {"train": None}}, {"eot_token": None}], ids=repr)
def test_a_meta_that_is_broken_is_told_by_file(content, documents):
    path = make(documents) / "meta.json"
    path.write_text(content if isinstance(content, str) else json.dumps(meta_of("data/mine") | content))
    with pytest.raises(ConfigError, match="data/mine/meta.json is not as.*make it again with python prepare"):
        prepare.load_data("mine", 16)


def nanogpt(ids, folder="data/shakespeare"):
    """A folder as nanoGPT makes it: no meta.json, no test split."""
    os.makedirs(folder, exist_ok=True)
    for split in ("train", "val"):
        ids.tofile(f"{folder}/{split}.bin")


def test_a_folder_of_nanogpt_is_read_offline(monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", raising(OSError("offline")))
    ids = np.random.default_rng(0).integers(0, 50257, 2_000_000).astype(np.uint16)
    nanogpt(ids)
    data, meta = prepare.load_data("shakespeare", 16)
    assert list(data) == ["train", "val"] and np.array_equal(data["val"], ids) and meta["tokenizer"] == "gpt2"
    for other in (np.append(ids[:-1], 5), np.insert(ids, len(ids) // 2, 5), np.append(5, ids[1:])):
        nanogpt(other.astype(np.uint16))  # other data has another fingerprint
        splits = prepare.load_data("shakespeare", 16)[1]["splits"]
        assert splits["val"]["sha256"] != meta["splits"]["val"]["sha256"]
    for other in (np.append(ids[:-1], 60_000), np.append(60_000, ids[1:])):
        nanogpt(other.astype(np.uint16))
        with pytest.raises(ConfigError, match="token id 60000, beyond the vocabulary of 50257"):
            prepare.load_data("shakespeare", 16)
    nanogpt(ids)
    assert prepare.load_data("shakespeare", 16)[1] == meta


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
def test_what_only_looks_like_nanogpt_is_refused_with_the_way_out(dtype):
    nanogpt(np.random.default_rng(0).integers(0, 50257, 2000).astype(dtype))
    with pytest.raises(ConfigError, match="train.bin looks like ids in uint32 or int64.*astype"):
        prepare.load_data("shakespeare", 16)
    nanogpt(np.arange(65, dtype=np.uint16).repeat(10))
    Path("data/shakespeare/meta.pkl").touch()
    with pytest.raises(ConfigError, match="characters.*--source=.*input.txt.*--tokenizer=bytes"):
        prepare.load_data("shakespeare", 16)
    os.remove("data/shakespeare/meta.pkl")
    os.remove("data/shakespeare/val.bin")
    with pytest.raises(ConfigError, match="val.bin is missing or empty"):
        prepare.load_data("shakespeare", 16)


# -----------------------------------------------------------------------------
# batches

CONFIG = {"seed": 3, "batch_size": 6, "gradient_accumulation_steps": 2, "block_size": 8}


def global_batch(data, step, processes=1, **changes):
    """The whole batch of a step, put together from every micro-step and process."""
    config = {**CONFIG, **changes}
    slices = []
    for micro in range(config["gradient_accumulation_steps"]):
        for process in range(processes):
            machine = SimpleNamespace(processes=processes, process=process, device="cpu")
            slices.append(prepare.get_batch(data, config, step, micro, machine))
    return prepare.Batch(*map(torch.cat, zip(*slices)))


def equal(a, b):
    return all(map(torch.equal, a, b))


def test_a_batch_is_a_function_of_seed_and_step():
    data = np.arange(10_000, dtype=np.uint16)
    batch = global_batch(data, 5)
    starts = [239, 1365, 566, 8830, 8176, 8978, 3001, 5772, 3331, 6900, 1790, 1021]
    assert batch.tokens[:, 0].tolist() == starts  # results that were published depend on them
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert equal(batch, global_batch(data, 5)) and equal(batch, global_batch(data.astype(np.uint32), 5))
    for other in (global_batch(data, 6), global_batch(data, 5, seed=4)):
        assert not torch.equal(batch.tokens, other.tokens)
        assert not torch.equal(batch.row_seeds, other.row_seeds)


def test_micro_steps_and_processes_slice_one_global_batch():
    data = np.arange(10_000, dtype=np.uint16)
    batch = global_batch(data, 5)
    assert batch.tokens.shape == (12, 8) and batch.row_seeds.shape == (12,)
    for processes in (2, 3):
        assert equal(batch, global_batch(data, 5, processes))
    assert equal(batch, global_batch(data, 5, batch_size=3, gradient_accumulation_steps=4))
    assert equal(batch, global_batch(data, 5, batch_size=12, gradient_accumulation_steps=1))
    assert equal(batch.rows(slice(2, 4)), [tensor[2:4] for tensor in batch])


def test_targets_are_the_next_tokens_and_every_start_can_be_drawn():
    data = np.arange(12, dtype=np.uint16)
    starts = set()
    for step in range(40):
        batch = global_batch(data, step)
        assert torch.equal(batch.targets, batch.tokens + 1) and batch.targets.max() <= 11
        assert all(tensor.dtype == torch.int64 for tensor in batch)
        starts |= set(batch.tokens[:, 0].tolist())
    assert starts == {0, 1, 2, 3}
    assert global_batch(data[:9], 0).tokens.shape == (12, 8)  # exactly one block


def test_evaluation_rows_are_fixed_spread_and_touch_no_random_state():
    data = np.arange(1000, dtype=np.uint16)
    torch.manual_seed(7), np.random.seed(7)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    batch = prepare.eval_batch(data, CONFIG, 4)
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    assert batch.tokens.shape == (24, 8) and torch.equal(batch.targets, batch.tokens + 1)
    assert batch.tokens[0, 0] == 0 and batch.targets[-1, -1] == 999
    assert equal(batch, prepare.eval_batch(data, {**CONFIG, "seed": 9}, 4))
    starts = prepare.eval_batch(data, CONFIG, 10 ** 6).tokens[:, 0].tolist()
    assert len(starts) == 999 // 8 == len(set(starts))  # at most the whole split
