"""Text to tokens: what prepare.py leaves on disk, and how training reads it."""
import hashlib
import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiktoken
import torch

import prepare
from configurator import ConfigError
from conftest import finish, go, make_documents, recipe, snapshot, start, summary_of, tiny, write_jsonl

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


def tokens(folder, split):
    return np.fromfile(Path(folder) / f"{split}.bin", dtype=np.uint16)


def read(folder, split):
    """The documents of a split, decoded."""
    ids, enc = tokens(folder, split), prepare.tokenizer("bytes")
    *parts, rest = np.split(ids, np.flatnonzero(ids == 256) + 1)
    assert len(rest) == 0  # the last one ends with end-of-text too
    return [enc.decode(part[:-1].tolist()) for part in parts]


def bins(folder):
    return {s: (Path(folder) / f"{s}.bin").read_bytes() for s in SPLITS}


def meta_of(folder):
    return json.loads((Path(folder) / "meta.json").read_text())


def streamed(texts, fail=None):
    """A stand-in for datasets.load_dataset: a stream of these texts, then perhaps an exception."""
    def rows(*args, **options):
        yield from ({"text": t} for t in texts)
        if fail:
            raise fail
    return rows


# -----------------------------------------------------------------------------
# tokenizers

@pytest.mark.parametrize("text", ["plain", "naïve 木 🙂", "\r\n\t\x00", "<|endoftext|>", "e\u0301 \u200b \ufeff", "a" * 5000])
def test_bytes_tokenizer_gives_back_any_text_and_counts_its_bytes(text):
    enc = prepare.tokenizer("bytes")
    ids = enc.encode(text, disallowed_special=())
    assert enc.decode(ids) == text and ids == list(text.encode()) and enc.n_vocab == 257 and enc.eot_token == 256


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
        datasets.Dataset.from_dict({"id": range(len(documents)), "text": documents}).to_parquet("files/a.parquet")
    else:
        write_jsonl("files/a.jsonl", documents[:30])
        write_jsonl("files/b.jsonl", documents[30:])
    go("prepare", f"--source=files/*.{kind.split()[0]}", "--name=mine", "--tokenizer=bytes")
    assert bins("data/mine") == expected


def test_documents_are_separated_by_end_of_text_and_nothing_is_lost(empty, documents):
    folder = make(documents)
    parts = {s: read(folder, s) for s in SPLITS}
    assert {s: len(p) for s, p in parts.items()} == {"train": 80, "val": 6, "test": 6}
    assert sorted(sum(parts.values(), [])) == sorted(documents)


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
    assert meta_of(folder)["dropped"] == {"empty": 2, "duplicate": 3, "leak": 0}


def test_a_lone_surrogate_is_replaced_not_fatal(empty, documents, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", streamed([*documents, "broken \ud800 text"]))
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes")
    assert "broken ? text" in sum((read("data/fineweb-edu", s) for s in SPLITS), [])


def test_tokens_stops_at_the_count(empty, documents):
    whole = make(documents, name="whole")
    first = make(documents, "--tokens=4K", name="first")
    total = sum(len(tokens(first, s)) for s in SPLITS)
    assert 4000 <= total < 4000 + 200 < sum(len(tokens(whole, s)) for s in SPLITS)
    assert all(bins(whole)[s].startswith(bins(first)[s]) for s in SPLITS)


@pytest.mark.parametrize("text, count", [("200M", 200_000_000), ("1.5k", 1500), ("2B", 2_000_000_000), ("123", 123)])
def test_counts_are_read(text, count):
    assert prepare.parse_count(text) == count


def check_meta(folder):
    meta = meta_of(folder)
    assert meta["dtype"] == "uint16" and set(meta["splits"]) == set(SPLITS)
    for split, facts in meta["splits"].items():
        ids = tokens(folder, split)
        assert facts["tokens"] == len(ids) and facts["documents"] == (ids == meta["eot_token"]).sum() > 0
        assert facts["sha256"] == hashlib.sha256((Path(folder) / f"{split}.bin").read_bytes()).hexdigest()
        assert ids.max() < meta["vocab_size"]
    return meta


def test_meta_is_true(empty, documents):
    meta = check_meta(make(documents))
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot_token"], meta["source"]) == ("bytes", 257, 256, "mine.jsonl")


# -----------------------------------------------------------------------------
# the embedded text

def test_stdlib_is_about_2_MB_and_its_meta_is_true(stdlib):
    meta = check_meta(stdlib)
    assert 1e6 < sum(s["tokens"] for s in meta["splits"].values()) < 1e7
    assert meta["dropped"]["leak"] > 0 and meta["dropped"]["duplicate"] == 0
    assert all(0.02 < meta["splits"][s]["tokens"] / meta["splits"]["train"]["tokens"] < 0.1 for s in ("val", "test"))


@pytest.mark.parametrize("split", ["val", "test"])
def test_no_64_byte_window_of_a_held_out_stdlib_document_is_in_training(stdlib, split):
    train = [d.encode() for d in read(stdlib, "train")]
    held_out = [d.encode() for d in read(stdlib, split)]
    assert not {hashlib.sha256(d).digest() for d in train} & {hashlib.sha256(d).digest() for d in held_out}
    windows = {d[i:i + 64] for d in held_out for i in range(len(d) - 63)}
    assert len(windows) > 10_000
    assert not any(d[i:i + 64] in windows for d in train for i in range(len(d) - 63))


def test_two_runs_give_identical_stdlib_bytes(stdlib, quickstart):
    assert bins(quickstart[0] / "data" / "stdlib") == bins(stdlib)  # another process, hash seed and number of workers


# -----------------------------------------------------------------------------
# the stream of fineweb-edu

def test_fineweb_edu_is_streamed_from_its_repository(empty, documents, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_dict({"text": documents, "score": [3.0] * len(documents)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes", "--tokens=1B")
    [(args, options)] = calls
    assert (*args, options.pop("path", None))[0] == "HuggingFaceFW/fineweb-edu"
    assert options["split"] == "train" and options["streaming"] is True
    assert bins("data/fineweb-edu") == bins(make(documents))
    assert meta_of("data/fineweb-edu")["source"] == "fineweb-edu"


def test_a_stream_is_not_read_far_past_the_count(empty, monkeypatch):
    read_rows = []

    def endless(*args, **options):
        for text in make_documents(2, train=300, held_out=3) * 100:
            read_rows.append(text)
            yield {"text": f"{len(read_rows)} {text}"}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes", "--tokens=60K", "--workers=1")
    assert len(read_rows) < 3000


# -----------------------------------------------------------------------------
# whole or not at all

@pytest.mark.parametrize("fail", [RuntimeError("the stream broke"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_an_interrupted_prepare_leaves_nothing_and_can_be_repeated(fail, empty, documents, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(datasets, "load_dataset", streamed(documents, fail))
        with pytest.raises((type(fail), ConfigError)):
            go("prepare", "--source=fineweb-edu", "--tokenizer=bytes")
    assert not list(Path("data").glob("**/*"))
    monkeypatch.setattr(datasets, "load_dataset", streamed(documents))
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes")
    check_meta("data/fineweb-edu")


def test_a_killed_prepare_leaves_nothing_under_the_name_and_the_next_one_cleans_up(empty, documents, monkeypatch):
    code = ("import datasets, os, signal, prepare\n"
            "def rows(*a, **k):\n"
            "    for i in range(2000):\n"
            "        yield {'text': f'document {i} ' * 20}\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "datasets.load_dataset = rows\n"
            "prepare.prepare('fineweb-edu', tokenizer_name='bytes')\n")
    code, _, err = finish(start("-c", code))
    assert code == -signal.SIGKILL, err
    left = os.listdir("data")
    assert left and "fineweb-edu" not in left  # it died while writing
    monkeypatch.setattr(datasets, "load_dataset", streamed(documents))
    go("prepare", "--source=fineweb-edu", "--tokenizer=bytes")
    assert bins("data/fineweb-edu") == bins(make(documents))
    assert sorted(os.listdir("data")) == ["fineweb-edu", "mine"]  # what the killed one had written is gone


def test_what_a_process_of_the_same_number_left_is_no_obstacle(empty, documents):
    stale = Path("data", f".mine.{os.getpid()}.part")  # in a container every run may have the same process number
    stale.mkdir(parents=True)
    (stale / "train.bin").write_bytes(b"old")
    check_meta(make(documents))


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(empty, documents, monkeypatch):
    def no_space(*args, **options):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(prepare.json, "dump", no_space)
    with pytest.raises(ConfigError, match="No space left"):
        make(documents)
    assert os.listdir("data") == []


def test_an_existing_folder_is_replaced_only_when_told_to(empty, documents):
    folder = make(documents[::-1])
    before = snapshot(folder, times=True)
    with pytest.raises(ConfigError, match="data/mine exists already.*--overwrite"):
        make(documents[::-1])
    assert snapshot(folder, times=True) == before and os.listdir("data") == ["mine"]
    make(documents, "--overwrite")
    assert bins(folder) == bins(make(documents, name="other"))
    assert sorted(os.listdir("data")) == ["mine", "other"]


def test_a_failing_overwrite_keeps_the_old_folder(empty, documents, monkeypatch):
    folder = make(documents)
    before = snapshot(folder, times=True)
    monkeypatch.setattr(datasets, "load_dataset", streamed(documents, RuntimeError("the stream broke")))
    with pytest.raises((RuntimeError, ConfigError)):
        make(documents, "--overwrite")
    assert snapshot(folder, times=True) == before and os.listdir("data") == ["mine"]


# -----------------------------------------------------------------------------
# reading

@pytest.fixture
def nanogpt(place, monkeypatch):
    """A folder as nanoGPT makes it: no meta.json, no test split; and the gpt2 vocabulary out of reach."""
    os.mkdir("data/shakespeare")
    for seed, split in enumerate(("train", "val")):
        np.random.default_rng(seed).integers(0, 50257, 2000).astype(np.uint16).tofile(f"data/shakespeare/{split}.bin")

    def offline(name):
        raise OSError("offline")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)


def test_a_folder_of_nanogpt_loads_and_trains_offline(nanogpt):
    go("train", *tiny("--dataset=shakespeare", "--backbone_iters=1", "--max_iters=2"))
    summary = summary_of("out/tiny/g3_full_aux/seed0")
    assert 10 < summary["val_loss"]["threshold"] < 12  # ln 50257 = 10.8
    assert not summary["test_loss"] and summary["dense_test_loss"] is None


def test_a_study_of_data_without_a_test_split_is_reported_or_refused(nanogpt):
    go("train", *tiny(recipe("cheap_only"), "--dataset=shakespeare", "--backbone_iters=1", "--max_iters=2",
                      "--out_dir=out/tiny/study/cheap_only/seed0"))
    try:
        go("study", *tiny("--arms=cheap_only", "--seeds=0", "--report_only", "--dataset=shakespeare"))
    except ConfigError as error:
        assert "test" in str(error)
    else:
        assert "cheap_only" in Path("out/tiny/study/report.md").read_text()


def test_a_folder_that_was_made_here_is_read_as_it_was_written(place):
    data, meta = prepare.load_data("tiny", 16)
    for split in SPLITS:
        assert np.array_equal(data[split], tokens("data/tiny", split)) and data[split].dtype == np.uint16
    assert meta == meta_of("data/tiny")


CONFIG = {"seed": 3, "batch_size": 6, "gradient_accumulation_steps": 2, "block_size": 8}


def global_batch(data, step, world=1, **changes):
    """The whole batch of a step, put together from every micro-step and rank."""
    config = {**CONFIG, **changes}
    slices = [prepare.get_batch(data, config, step, micro, SimpleNamespace(world=world, rank=rank, device="cpu"))
              for micro in range(config["gradient_accumulation_steps"]) for rank in range(world)]
    return [torch.cat(parts) for parts in zip(*slices)]


def test_a_batch_is_a_function_of_seed_and_step():
    data = np.arange(10_000, dtype=np.uint16)
    batch = global_batch(data, 5)
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    assert all(map(torch.equal, batch, global_batch(data, 5)))
    for other in (global_batch(data, 6), global_batch(data, 5, seed=4)):
        assert not torch.equal(batch[0], other[0]) and not torch.equal(batch[2], other[2])


def test_micro_steps_and_ranks_slice_one_global_batch():
    data = np.arange(10_000, dtype=np.uint16)
    batch = global_batch(data, 5)
    assert batch[0].shape == (12, 8) and batch[2].shape == (12,)
    for world in (2, 3):
        assert all(map(torch.equal, batch, global_batch(data, 5, world)))
    assert all(map(torch.equal, batch, global_batch(data, 5, batch_size=3, gradient_accumulation_steps=4)))
    assert all(map(torch.equal, batch, global_batch(data, 5, batch_size=12, gradient_accumulation_steps=1)))


def test_targets_are_the_next_tokens_and_every_start_can_be_drawn():
    data = np.arange(12, dtype=np.uint16)
    drawn = set()
    for step in range(40):
        x, y, keys = global_batch(data, step)
        assert torch.equal(y, x + 1) and x.dtype == y.dtype == keys.dtype == torch.int64 and y.max() <= 11
        drawn |= set(x[:, 0].tolist())
    assert drawn == {0, 1, 2, 3}
    assert global_batch(data[:9], 0)[0].shape == (12, 8)  # exactly one block


def test_evaluation_rows_are_fixed_spread_and_touch_no_random_state():
    data = np.arange(1000, dtype=np.uint16)
    torch.manual_seed(7), np.random.seed(7)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    x, y, keys = prepare.eval_batch(data, CONFIG, 4)
    assert torch.equal(state[0], torch.get_rng_state()) and np.array_equal(state[1], np.random.get_state()[1])
    assert x.shape == (24, 8) and torch.equal(y, x + 1) and x[0, 0] == 0 and y[-1, -1] == 999
    assert all(map(torch.equal, (x, y, keys), prepare.eval_batch(data, {**CONFIG, "seed": 9}, 4)))
    x = prepare.eval_batch(data, CONFIG, 10 ** 6)[0]
    assert len(x) == 999 // 8 and len(set(x[:, 0].tolist())) == len(x)  # at most the whole split
