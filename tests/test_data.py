"""Text to tokens: what prepare.py leaves on disk, and how training reads it."""
import errno
import hashlib
import json
import math
import os
import random
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiktoken
import torch

import prepare
from configurator import ConfigError
from conftest import HERE, finish, go, make_documents, snapshot, start, summary_of, tiny, write_jsonl

SPLITS = ("train", "val", "test")


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory):
    """data/ with the embedded text, made in this process by one worker."""
    root = tmp_path_factory.mktemp("stdlib") / "data"
    prepare.prepare(workers=1, root=str(root))
    return root / "stdlib"


def make(texts, *words, name="mine"):
    """Prepare local texts -> their folder."""
    write_jsonl(f"{name}.jsonl", texts)
    go("prepare", f"--source={name}.jsonl", f"--name={name}", "--tokenizer=bytes", *words)
    return Path("data", name)


def make_from(source, *words, name="mine"):
    """Prepare files that are there -> their meta."""
    go("prepare", f"--source={source}", f"--name={name}", "--tokenizer=bytes", *words)
    return check_meta(Path("data", name))


def tokens(folder, split):
    return np.fromfile(Path(folder) / f"{split}.bin", dtype=np.uint16)


def read(folder, split):
    """The documents of a split, decoded."""
    ids, enc = tokens(folder, split), prepare.tokenizer("bytes")
    *documents, rest = np.split(ids, np.flatnonzero(ids == 256) + 1)
    assert len(rest) == 0  # the last one ends with end-of-text too
    return [enc.decode(document[:-1].tolist()) for document in documents]


def read_all(folder):
    return sum((read(folder, split) for split in SPLITS), [])


def bins(folder):
    return {s: (Path(folder) / f"{s}.bin").read_bytes() for s in SPLITS}


def meta_of(folder):
    return json.loads((Path(folder) / "meta.json").read_text())


def check_meta(folder):
    """Everything in meta.json is true -> the meta."""
    meta = meta_of(folder)
    assert meta["dtype"] == "uint16" and set(meta["splits"]) == set(SPLITS)
    for split, facts in meta["splits"].items():
        ids = tokens(folder, split)
        assert facts["tokens"] == len(ids) and facts["documents"] == (ids == meta["eot_token"]).sum()
        assert facts["sha256"] == hashlib.sha256((Path(folder) / f"{split}.bin").read_bytes()).hexdigest()
        assert len(ids) == 0 or ids.max() < meta["vocab_size"]
    kept = sum(facts["documents"] for facts in meta["splits"].values())
    assert sum(meta["read"].values()) == kept + sum(meta["dropped"].values())
    return meta


def streamed(texts, fail=None):
    """A stand-in for datasets.load_dataset: a stream of these texts, then perhaps an exception."""
    def rows(*args, **options):
        yield from ({"text": t} for t in texts)
        if fail:
            raise fail
    return rows


def raising(error):
    def fail(*args, **options):
        raise error
    return fail


# -----------------------------------------------------------------------------
# tokenizers

TEXTS = ["plain", "naïve 木 🙂", "\r\n\t\x00", "<|endoftext|>", "e\u0301 \u200b \ufeff", "a" * 5000]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_tokenizer_gives_back_any_text_and_counts_its_bytes(text):
    enc = prepare.tokenizer("bytes")
    ids = enc.encode(text, disallowed_special=())
    assert enc.decode(ids) == text and ids == list(text.encode())
    assert enc.n_vocab == 257 and enc.eot_token == 256


def test_gpt2_tokenizer_is_gpt2s(empty, documents):
    try:
        enc = prepare.tokenizer("gpt2")
    except ConfigError:
        pytest.skip("tiktoken cannot load the gpt2 vocabulary here")
    assert enc.encode("Hello world") == [15496, 995] and enc.decode(enc.encode("naïve 木")) == "naïve 木"
    write_jsonl("a.jsonl", documents)
    go("prepare", "--source=a.jsonl", "--name=mine")
    meta = meta_of("data/mine")
    assert (meta["vocab_size"], meta["eot_token"]) == (50257, 50256)
    assert enc.decode(tokens("data/mine", "val").tolist()).split("<|endoftext|>")[0] in documents


# -----------------------------------------------------------------------------
# what is on disk

@pytest.mark.parametrize("kind", ["txt", "parquet", "jsonl in two files"])
def test_every_kind_of_file_gives_the_same_bins(kind, empty, documents):
    expected = bins(make(documents, name="expected"))
    os.mkdir("files")
    if kind == "txt":
        for i, text in enumerate(documents):
            Path(f"files/{i:04}.txt").write_text(text)
    elif kind == "parquet":
        rows = {"id": range(len(documents)), "text": documents}
        datasets.Dataset.from_dict(rows).to_parquet("files/a.parquet")
    else:
        write_jsonl("files/a.jsonl", documents[:30])
        write_jsonl("files/b.jsonl", documents[30:])
    make_from(f"files/*.{kind.split()[0]}")
    assert bins("data/mine") == expected


def test_documents_are_separated_by_end_of_text_and_nothing_is_lost(empty, documents):
    folder = make(documents)
    assert {s: len(read(folder, s)) for s in SPLITS} == {"train": 80, "val": 6, "test": 6}
    assert sorted(read_all(folder)) == sorted(documents)


def test_order_of_documents_does_not_change_a_split(empty, documents):
    shuffled = random.Random(1).sample(documents, len(documents))
    a, b = make(documents, name="a"), make(shuffled, name="b")
    assert bins(a) != bins(b)
    for split in SPLITS:
        assert sorted(read(a, split)) == sorted(read(b, split))


def test_number_of_workers_does_not_change_a_byte(empty):
    many = make_documents(5, train=400, held_out=3)  # several batches
    one = bins(make(many, "--workers=1", name="one"))
    assert one == bins(make(many, "--workers=3", name="three")) == bins(make(many, name="default"))


def test_duplicates_and_empty_documents_are_dropped_and_counted(empty, documents):
    clean = bins(make(documents, name="clean"))
    folder = make(["", *documents, documents[3], "", documents[3], documents[80]], name="dirty")
    assert bins(folder) == clean
    assert check_meta(folder)["dropped"] == {"empty": 2, "duplicate": 3, "leak": 0}


def test_a_lone_surrogate_is_replaced_not_fatal(empty, documents):
    assert "broken ? text" in read_all(make([*documents, "broken \ud800 text"]))


def test_meta_is_true(empty, documents):
    meta = check_meta(make(documents))
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"]) == ("bytes", 257, 256)
    assert meta["source"] == "mine.jsonl" and meta["read"] == {"mine.jsonl": 92}


COUNTS = [("200M", 200_000_000), ("1.5k", 1500), ("2B", 2_000_000_000), ("123", 123), ("", math.inf)]


@pytest.mark.parametrize("text, count", COUNTS)
def test_counts_are_read(text, count):
    assert prepare.parse_count(text) == count


def test_tokens_stops_at_the_count_and_cuts_by_order_without_moving_a_document(empty, documents):
    whole = make(documents, name="whole")
    first = make(documents, "--tokens=4K", name="first")
    total = sum(len(tokens(first, s)) for s in SPLITS)
    assert 4000 <= total < 4000 + 200 < sum(len(tokens(whole, s)) for s in SPLITS)
    assert all(bins(whole)[s].startswith(bins(first)[s]) for s in SPLITS)
    last = make(documents[::-1], "--tokens=4K", name="last")
    assert set(read_all(last)) != set(read_all(first))
    for split in SPLITS:
        assert set(read(last, split)) <= set(read(whole, split))


def test_the_time_that_is_told_counts_the_reading(empty, documents, monkeypatch):
    def slow():
        time.sleep(0.5)
        yield from make_documents(0, train=200, held_out=20)
    monkeypatch.setattr(prepare, "stdlib_documents", slow)
    out = go("prepare")
    assert float(re.search(r"in ([\d.]+) s", out)[1]) >= 0.5, out


def test_progress_tells_what_is_left(empty, documents, monkeypatch):
    clock = iter(range(0, 10 ** 6, 3))
    monkeypatch.setattr(prepare, "time", SimpleNamespace(time=lambda: next(clock)))
    write_jsonl("a.jsonl", documents)
    out = go("prepare", "--source=a.jsonl", "--name=mine", "--tokenizer=bytes", "--tokens=4K")
    assert re.search(r"0\.0M tokens, 0\.00M tokens/s, \d+ s left", out), out


# -----------------------------------------------------------------------------
# local files: each once, by its literal name

NAMES = ["a.jsonl", "[a].jsonl", "b [1].jsonl", "c?.jsonl", "d*.jsonl", "{e}.jsonl", "9%.jsonl", "ï.jsonl"]


def test_each_file_is_read_once_by_its_literal_name_and_stands_in_meta(empty):
    os.mkdir("br")
    texts = {}
    for i, name in enumerate(NAMES):
        texts[name] = make_documents(i, train=10 + i, held_out=1)
        write_jsonl(f"br/{name}", texts[name])
    meta = make_from("br/*")
    assert meta["read"] == {f"br/{name}": len(texts[name]) for name in NAMES}
    assert sorted(read_all("data/mine")) == sorted(sum(texts.values(), []))
    assert meta["dropped"]["duplicate"] == 0


@pytest.mark.parametrize("name", ["b [1].jsonl", "[a].jsonl"])
@pytest.mark.parametrize("source", ["br/*", "br/{name}"])
def test_a_name_with_brackets_is_read_alone(name, source, empty, documents):
    os.mkdir("br")
    write_jsonl(f"br/{name}", documents)
    write_jsonl("b1.jsonl", ["of another file"])
    assert make_from(source.format(name=name))["read"] == {f"br/{name}": len(documents)}


def test_a_file_that_is_empty_or_beyond_the_count_is_told_with_no_documents(empty, documents):
    os.mkdir("br")
    Path("br/a.jsonl").touch()
    write_jsonl("br/b.jsonl", documents)
    write_jsonl("br/c.jsonl", ["never reached"])
    read_files = make_from("br/*", "--tokens=4K")["read"]
    assert read_files["br/a.jsonl"] == read_files["br/c.jsonl"] == 0 < read_files["br/b.jsonl"]


def parquet(path, **columns):
    datasets.Dataset.from_dict(columns).to_parquet(path)


def damaged_parquet(path):
    """Its footer is whole, its pages are not."""
    parquet(path, text=make_documents(1))
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:4] + bytes(2000) + data[2004:])


LINE = b'{"text": "one"}\n'
BROKEN = {  # what is in the file z -> what its line must say besides its name
    "jsonl, a broken line": ("z.jsonl", LINE + b'{"text": "a\n', ["line 2", "not JSON"]),
    "jsonl, a list": ("z.jsonl", b"[1]\n", ["line 1", "no object"]),
    "jsonl, nested without end": ("z.jsonl", b"[" * 100_000, ["line 1", "not JSON"]),
    "jsonl without text": ("z.jsonl", b'{"content": "a"}\n', ["`text`", "content", "rename"]),
    "jsonl with a null": ("z.jsonl", LINE + b'{"text": null}\n', ["line 2", "`text`"]),
    "jsonl that is no UTF-8": ("z.jsonl", LINE + b'{"text": "\xff\xfe"}\n', ["UTF-8"]),
    "txt that is no UTF-8": ("z.txt", b"good \xff bad", ["UTF-8"]),
    "a parquet without text": ("z.parquet", lambda path: parquet(path, content=["a"]), ["`text`", "content"]),
    "a parquet of numbers": ("z.parquet", lambda path: parquet(path, text=[1]), ["`text`"]),
    "a parquet with a null": ("z.parquet", lambda path: parquet(path, text=["a", None]), ["`text`"]),
    "text for a parquet": ("z.parquet", b"hello", ["cannot be read"]),
    "a damaged parquet": ("z.parquet", damaged_parquet, ["cannot be read"]),
    "no file behind a link": ("z.jsonl", lambda path: os.symlink("nowhere", path), ["No such file"]),
    "a file that gives no bytes": ("z.txt", lambda path: os.symlink("/proc/self/mem", path), ["be read"]),
}


@pytest.mark.parametrize("name, content, needles", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_line_that_names_it_and_leaves_nothing(name, content, needles, empty, documents):
    os.mkdir("texts")
    if name == "z.jsonl":
        write_jsonl("texts/a.jsonl", documents)
    elif name == "z.parquet":
        parquet("texts/a.parquet", text=documents)
    path = f"texts/{name}"
    if callable(content):
        content(path)
    else:
        Path(path).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        make_from("texts/*")
    assert all(needle in str(caught.value) for needle in [path, *needles]), caught.value
    assert os.listdir("data") == []


# -----------------------------------------------------------------------------
# the embedded text

def test_stdlib_is_about_2_MB_and_its_meta_is_true(stdlib):
    meta = check_meta(stdlib)
    assert 1e6 < sum(s["tokens"] for s in meta["splits"].values()) < 1e7
    assert meta["dropped"]["leak"] > 0 and meta["dropped"]["duplicate"] == 0
    for split in ("val", "test"):
        assert 0.02 < meta["splits"][split]["tokens"] / meta["splits"]["train"]["tokens"] < 0.1


@pytest.mark.parametrize("split", ["val", "test"])
def test_no_64_byte_window_of_a_held_out_stdlib_document_is_in_training(stdlib, split):
    train = [d.encode() for d in read(stdlib, "train")]
    held_out = [d.encode() for d in read(stdlib, split)]
    assert not {hashlib.sha256(d).digest() for d in train} & {hashlib.sha256(d).digest() for d in held_out}
    windows = {d[i:i + 64] for d in held_out for i in range(len(d) - 63)}
    assert len(windows) > 10_000
    assert not any(d[i:i + 64] in windows for d in train for i in range(len(d) - 63))


def test_two_runs_give_identical_stdlib_bytes(stdlib, empty):
    """Another process, hash seed and number of workers."""
    code, out, err = finish(start(HERE / "prepare.py", "--workers=3", cwd=empty, env={"PYTHONHASHSEED": "1"}))
    assert code == 0, err
    assert bins("data/stdlib") == bins(stdlib)


# -----------------------------------------------------------------------------
# the stream of fineweb-edu

FINEWEB_CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""


def make_fineweb(texts):
    """A folder with the layout and the columns of the repository; `datasets` prefers it to the network."""
    folder = Path(prepare.FINEWEB)
    for place in ("data/CC-MAIN-2013-20", "sample/10BT"):
        (folder / place).mkdir(parents=True)
    (folder / "README.md").write_text(FINEWEB_CARD)
    for i, batch in enumerate((texts[:50], texts[50:])):
        n = len(batch)
        parquet(folder / f"sample/10BT/00{i}_00000.parquet", text=batch, id=["<urn:uuid:1>"] * n,
                dump=["CC-MAIN-2013-20"] * n, url=["http://example.org"] * n, language_score=[0.97] * n,
                token_count=[9] * n, score=[3.1] * n, int_score=[3] * n)
    parquet(folder / "data/CC-MAIN-2013-20/train-0.parquet", text=["not of the sample"])


def test_fineweb_edu_is_streamed_from_its_repository(empty, documents):
    make_fineweb(documents)
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes", "--tokens=1B")
    assert bins("data/fineweb-edu") == bins(make(documents))
    meta = check_meta("data/fineweb-edu")
    assert meta["source"] == "fineweb-edu" and meta["read"] == {prepare.FINEWEB: len(documents)}


def test_a_stream_is_not_read_far_past_the_count(empty, monkeypatch):
    read_rows = []

    def endless(*args, **options):
        assert options["streaming"] is True
        for text in make_documents(2, train=300, held_out=3) * 100:
            read_rows.append(text)
            yield {"text": f"{len(read_rows)} {text}"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes", "--tokens=60K", "--workers=1")
    assert len(read_rows) < 3000


def test_without_a_network_one_line_says_so(empty, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", raising(ConnectionError("Couldn't reach the Hub")))
    with pytest.raises(ConfigError, match="fineweb-edu cannot be read.*reach the Hub.*check the network"):
        go("prepare", "--source=fineweb-edu", "--tokenizer=bytes")


# -----------------------------------------------------------------------------
# whole or not at all

@pytest.mark.parametrize("fail", [RuntimeError("the stream broke"), KeyboardInterrupt()],
                         ids=lambda e: type(e).__name__)
def test_an_interrupted_prepare_leaves_nothing_and_can_be_repeated(fail, empty, documents, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(datasets, "load_dataset", streamed(documents, fail))
        with pytest.raises((KeyboardInterrupt, ConfigError)):
            go("prepare", "--source=fineweb-edu", "--tokenizer=bytes")
    assert not list(Path("data").glob("**/*"))
    monkeypatch.setattr(datasets, "load_dataset", streamed(documents))
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes")
    check_meta("data/fineweb-edu")


def in_a_child(work):
    """Call work() in a fork of this process, which then ends -> its number."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_kills_at_random_moments_leave_nothing_half_made_and_a_repeat_gives_the_same_bytes(empty):
    texts = make_documents(7, train=3000, held_out=40)
    began = time.time()
    expected = bins(make(texts, "--workers=1", name="expected"))
    seconds = time.time() - began
    write_jsonl("mine.jsonl", texts)
    rng, killed = random.Random(0), 0
    for _ in range(8):
        pid = in_a_child(lambda: make_from("mine.jsonl", "--workers=1", "--overwrite"))
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if os.path.exists("data/mine"):
            check_meta("data/mine")
            assert bins("data/mine") == expected
    assert killed >= 2
    make_from("mine.jsonl", "--workers=1", "--overwrite")
    assert bins("data/mine") == expected
    assert sorted(os.listdir("data")) == ["expected", "mine"]  # what the killed ones had written is gone


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_kill_while_the_old_folder_is_replaced_keeps_the_old_or_the_new(nth, empty, documents, monkeypatch):
    old, new = bins(make(documents)), bins(make(documents[::-1], name="new"))
    renamed = []

    def killing(source, target):
        renamed.append(target)
        if len(renamed) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        os.rename(source, target)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", killing)
        os.waitpid(in_a_child(lambda: make_from("new.jsonl", "--overwrite")), 0)
    with pytest.raises(ConfigError, match="exists already"):  # it cleans up first
        make_from("new.jsonl")
    assert bins("data/mine") == (new if nth == 3 else old)
    assert sorted(os.listdir("data")) == ["mine", "new"]


def test_what_a_process_of_the_same_number_left_is_no_obstacle(empty, documents):
    stale = Path("data", f".mine.{os.getpid()}.part")  # in a container every run may have the same number
    stale.mkdir(parents=True)
    (stale / "train.bin").write_bytes(b"old")
    check_meta(make(documents))


def test_another_names_leftovers_and_living_processes_are_left_alone(empty, documents):
    theirs = [Path("data", f".mine.b.{2 ** 22 + 1}.part.old"), Path("data", f".mine.{os.getppid()}.part")]
    for folder in theirs:
        folder.mkdir(parents=True)
    check_meta(make(documents))
    assert all(folder.is_dir() for folder in theirs)


def test_everything_is_synced_before_the_folder_gets_its_name(empty, documents, monkeypatch):
    done = []
    monkeypatch.setattr(prepare, "sync", lambda path: done.append(os.path.basename(path)))
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    make(documents)
    temporary = f".mine.{os.getpid()}.part"
    assert sorted(done[:4]) == ["meta.json", "test.bin", "train.bin", "val.bin"]
    assert done[4:] == [temporary, "rename", "data"]


def test_only_a_full_disk_is_told_to_free_space(empty, documents, monkeypatch):
    monkeypatch.setattr(prepare, "sync", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(ConfigError, match="cannot write data/mine: No space left.*free space"):
        make(documents)
    monkeypatch.setattr(prepare, "sync", raising(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(ConfigError, match="Read-only file system.*can be written") as caught:
        make(documents)
    assert "free space" not in str(caught.value)
    assert os.listdir("data") == []


def test_a_missing_folder_is_called_missing(empty, documents):
    os.symlink("nowhere/data", "data")
    with pytest.raises(ConfigError, match="cannot write data/mine.*the folder data is missing") as caught:
        make(documents)
    assert "free space" not in str(caught.value)


def test_an_existing_folder_is_replaced_only_when_told_to(empty, documents):
    folder = make(documents[::-1])
    before = snapshot(folder, times=True)
    with pytest.raises(ConfigError, match="data/mine exists already.*--overwrite"):
        make(documents[::-1])
    assert snapshot(folder, times=True) == before and os.listdir("data") == ["mine"]
    make(documents, "--overwrite")
    assert bins(folder) == bins(make(documents, name="other"))
    assert sorted(os.listdir("data")) == ["mine", "other"]


@pytest.mark.parametrize("fail", ["reading", "renaming"])
def test_a_failing_overwrite_keeps_the_old_folder(fail, empty, documents, monkeypatch):
    folder = make(documents)
    before = snapshot(folder, times=True)
    rename = os.replace

    def failing(source, target):
        if source.endswith(".part"):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    if fail == "reading":
        monkeypatch.setitem(prepare.READERS, ".jsonl", raising(RuntimeError("the stream broke")))
    else:
        monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ConfigError):
        make(documents[::-1], "--overwrite")
    assert snapshot(folder, times=True) == before and os.listdir("data") == ["mine"]


def a_link_to_data(documents):
    make(documents, name="precious")
    os.symlink("precious", "data/mine")


def a_link_to_nothing(documents):
    os.mkdir("data")
    os.symlink("nowhere", "data/mine")


def a_file(documents):
    os.mkdir("data")
    Path("data/mine").write_text("notes")


def a_folder_with_more(documents):
    Path(make(documents), "input.txt").write_text("the only copy")


OTHERS = {a_link_to_data: "is a symbolic link to 'precious'",
          a_link_to_nothing: "is a symbolic link to 'nowhere'", a_file: "is a file",
          a_folder_with_more: "holds 'input.txt' too"}


@pytest.mark.parametrize("place_it, message", OTHERS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_overwrite_replaces_nothing_but_data(place_it, message, empty, documents):
    place_it(documents)
    before = snapshot("data", times=True)
    with pytest.raises(ConfigError, match=f"data/mine {message}.*--overwrite"):
        make(documents[::-1], "--overwrite")
    with pytest.raises(ConfigError, match="data/mine exists already"):
        make(documents[::-1])
    assert snapshot("data", times=True) == before


# -----------------------------------------------------------------------------
# reading

@pytest.fixture
def nanogpt(place, monkeypatch):
    """A folder as nanoGPT makes it: no meta.json, no test split; and the gpt2 vocabulary out of reach."""
    os.mkdir("data/shakespeare")
    for seed, split in enumerate(("train", "val")):
        ids = np.random.default_rng(seed).integers(0, 50257, 2000).astype(np.uint16)
        ids.tofile(f"data/shakespeare/{split}.bin")
    monkeypatch.setattr(tiktoken, "get_encoding", raising(OSError("offline")))


def test_a_folder_of_nanogpt_loads_and_trains_offline(nanogpt):
    go("train", *tiny("--dataset=shakespeare", "--backbone_iters=1", "--max_iters=2"))
    summary = summary_of("out/tiny/g3_full_aux/seed0")
    assert 10 < summary["val_loss"]["threshold"] < 12  # ln 50257 = 10.8
    assert not summary["test_loss"] and summary.get("dense_test_loss") is None


def test_a_folder_that_was_made_here_is_read_as_it_was_written(empty, documents):
    make(documents)
    data, meta = prepare.load_data("mine", 16)
    for split in SPLITS:
        assert np.array_equal(data[split], tokens("data/mine", split)) and data[split].dtype == np.uint16
    assert meta == meta_of("data/mine")


META = {  # what is wrong with meta.json -> what the line must say
    "no tokenizer": (lambda meta: meta.pop("tokenizer"), ["tokenizer is None, not str"]),
    "an unknown tokenizer": (lambda meta: meta.update(tokenizer="klingon"), ["tokenizer is 'klingon'"]),
    "a count in quotes": (lambda meta: meta.update(vocab_size="257"), ["vocab_size is '257', not int"]),
    "too large a vocabulary": (lambda meta: meta.update(vocab_size=10 ** 6), ["vocab_size is 1000000"]),
    "a truth for a count": (lambda meta: meta.update(vocab_size=True), ["vocab_size is True"]),
    "another dtype": (lambda meta: meta.update(dtype="int32"), ["dtype is 'int32'"]),
    "a list of splits": (lambda meta: meta.update(splits=[]), ["splits is [], not dict"]),
    "no val": (lambda meta: meta["splits"].pop("val"), ["splits", "val"]),
    "null for a split": (lambda meta: meta["splits"].update(train=None), ["splits", "train"]),
    "another count": (lambda meta: meta["splits"]["val"].update(tokens=5), ["val.bin", "tokens", "5"]),
    "another hash": (lambda meta: meta["splits"]["test"].update(sha256="0"), ["test.bin", "sha256", "'0'"]),
    "no hash": (lambda meta: meta["splits"]["test"].pop("sha256"), ["test.bin", "sha256", "None"]),
}


@pytest.mark.parametrize("spoil, needles", META.values(), ids=META)
def test_what_is_wrong_with_meta_is_told_by_field(spoil, needles, empty, documents):
    path = make(documents) / "meta.json"
    meta = meta_of("data/mine")
    spoil(meta)
    path.write_text(json.dumps(meta))
    with pytest.raises(ConfigError) as caught:
        prepare.load_data("mine", 16)
    wanted = ["data/mine/", *needles, "make it again with python prepare.py --name=mine --overwrite"]
    assert all(needle in str(caught.value) for needle in wanted), caught.value


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff{}", b"", b"[" * 100_000], ids=lambda b: repr(b[:4]))
def test_a_meta_that_is_no_object_is_told_by_file(content, empty, documents):
    (make(documents) / "meta.json").write_bytes(content)
    with pytest.raises(ConfigError, match="data/mine/meta.json.*make it again with python prepare.py"):
        prepare.load_data("mine", 16)


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
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert equal(batch, global_batch(data, 5))
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


def test_rows_of_a_batch_keep_tokens_targets_and_seeds_together():
    batch = global_batch(np.arange(10_000, dtype=np.uint16), 5)
    assert equal(batch.rows(slice(2, 4)), [tensor[2:4] for tensor in batch])
