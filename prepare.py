"""Text -> tokens on disk: data/<name>/{train,val,test}.bin, ids in a row as nanoGPT has them, and meta.json.

    python prepare.py                                       the English inside CPython, as bytes, no network
    python prepare.py --source=fineweb-edu --tokens=200M    streams HuggingFaceFW/fineweb-edu, GPT-2 BPE
    python prepare.py --source=book.txt --name=book         a file, a folder or a glob in quotes, GPT-2 BPE
    python prepare.py --source='my/*.parquet' --name=my --tokenizer=hf:HuggingFaceTB/SmolLM2-135M

Local files are .parquet, .jsonl, .ndjson and .json, a document a row, or .txt and .md, a document a file;
each also as .gz or .zst. Exact duplicates are dropped. Every document ends with the end-of-text token.

A document's split follows from its hash, whatever its place. But fewer than 1,000 documents, or so few
tokens that val or test would have under 4,096, are split by position: the last 5% of the tokens are test, the
5% before them val. meta.json says which of the two it was.
"""
import ast
import gc
import glob
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from configurator import ConfigError, configure, exit_on_error, show_help_if_asked

import numpy as np
import torch

from encoding import brief, tokenizer

DEFAULTS = dict(
    source="stdlib",  # stdlib, fineweb-edu, or local files: a file, a folder or a glob
    name="",  # the folder under data/; by default the source's name
    tokens="",  # stop at this count, such as 200M; by default all there is
    tokenizer="",  # bytes, gpt2, hf:FOLDER or hf:NAME on the hub; by default bytes for stdlib, gpt2 otherwise
    text_column="text",  # the column that holds the text
    workers=0,  # tokenizing threads; 0 is one per core
    overwrite=False,  # replace data/<name>
)
SPLITS = ("train", "val", "test")
FINEWEB = "HuggingFaceFW/fineweb-edu"
RETRY_WAITS = (2, 10, 60, 300)  # seconds before each further try at a stream that broke
HELD_OUT = {"stdlib": 0.05}  # the share of documents that val and test get, each
HELD_OUT_ELSE = 0.01
FEW_DOCUMENTS, FEW_TOKENS, HELD_OUT_BY_POSITION = 1000, 4096, 0.05  # see split_ranges


# -----------------------------------------------------------------------------
# documents

def stdlib_documents():
    """The English inside every CPython, a list: pydoc_data's topics and the standard library's docstrings."""
    from pydoc_data.topics import topics
    texts, paths = list(topics.values()), []
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        others = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data")
        folders[:] = [name for name in folders if name not in others]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    gc.disable()  # it would take two thirds of the time to find that syntax trees are no garbage
    try:
        for path in sorted(paths):
            texts += docstrings(path)
    finally:
        gc.enable()
    return texts


def docstrings(path):
    """Those of a module, its classes and functions, the outer ones first; "" for each without."""
    try:
        with open(path, "rb") as f:
            nodes = [ast.parse(f.read())]
    except (SyntaxError, ValueError, OSError):
        return []  # lib2to3 ships a few files of Python 2
    for node in nodes:  # the list grows; only statements hold definitions
        for field in ("body", "handlers", "cases", "orelse", "finalbody"):
            nodes += getattr(node, field, ())
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    return [ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds)]


def drop_leaks(documents, held_out):
    """Drop the val and test documents that share 64 bytes in a row with a train document: docstrings repeat.
    Returns the documents kept and the count dropped."""
    texts = [document.encode() for document in documents]
    in_train = np.array([split_of(hashlib.sha256(text).digest(), held_out) == "train" for text in texts])
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])  # of each byte, its document
    hashes = window_hashes(b"".join(texts))
    within = owner[:len(hashes)] == owner[63:]  # not the end of one document and the beginning of another
    hashes, owner = hashes[within], owner[:len(hashes)][within]
    held = ~in_train[owner]
    trained = np.sort(hashes[~held])
    found = np.searchsorted(trained, hashes[held], "left") < np.searchsorted(trained, hashes[held], "right")
    leaks = set(owner[held][found].tolist())
    return [document for i, document in enumerate(documents) if i not in leaks], len(leaks)


def window_hashes(data):
    """A 64-bit hash of every 64 bytes in a row."""
    words = np.ndarray(max(0, len(data) - 7), np.uint64, data, strides=(1,))  # every 8 bytes in a row
    hashes = np.zeros(max(0, len(data) - 63), np.uint64)
    for i in range(0, 64, 8):
        hashes = (hashes ^ words[i:i + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(32)
    return hashes


READERS = {".parquet": "from_parquet", ".jsonl": "from_json", ".ndjson": "from_json", ".json": "from_json",
           ".txt": "from_text", ".md": "from_text"}  # methods of datasets.IterableDataset


def reader_of(path):
    """a/B.jsonl.gz -> from_json"""
    stem, kind = os.path.splitext(path.lower())
    return READERS.get(os.path.splitext(stem)[1] if kind in (".gz", ".zst") else kind)


def local_files(source):
    """A file, a glob or a folder -> its files, sorted. A name that exists is meant literally, with brackets;
    of a folder, the files whose kind is known."""
    if os.path.isdir(source):
        paths = filter(reader_of, glob.glob(f"{glob.escape(source)}/**/*", recursive=True))
    else:
        paths = [source] if os.path.exists(source) else glob.glob(source, recursive=True)
    files = sorted({path for path in paths if os.path.isfile(path)})
    readers = {reader_of(path) for path in files}
    if len(readers) != 1 or None in readers:
        found = "files that are not of one known kind" if files else "no file"
        raise ConfigError(f"--source={source!r} matches {found}; name stdlib, fineweb-edu, or files of one "
                          f"kind ({', '.join(READERS)}), such as --source='folder/*.parquet'")
    return files


def local_documents(files, text_column):
    """Yields (file, text): one text for each row, or for each .txt or .md file."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is told once, below
    with tempfile.TemporaryDirectory() as cache:  # gets lock files, nothing else
        for path in files:
            options = {}
            if reader_of(path) == "from_text":
                options = {"sample_by": "document", "encoding": "utf-8-sig"}
            try:
                read = getattr(datasets.IterableDataset, reader_of(path))
                rows = read(glob.escape(path), cache_dir=cache, **options)
                if text_column in (rows.column_names or []):
                    rows = rows.select_columns([text_column])  # the others need not be decoded
                for row in rows:
                    yield path, text_of(row, text_column, path)
            except ConfigError:
                raise
            except StopIteration:  # an empty file
                continue
            except Exception as error:  # of the file system, of `datasets`, of pyarrow
                raise ConfigError(f"{path} cannot be read ({brief(error)}); mend it, or leave it "
                                  "out") from None


def text_of(row, column, where):
    """The text of a row {column: value}; "" for a null."""
    text = row.get(column, 0)
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{where} has no text in a column {column!r} (its columns: {', '.join(row)}); say "
                          "which holds the text with --text_column=NAME")
    return text or ""


def fineweb_documents(text_column):
    """fineweb-edu, streamed by Hugging Face `datasets`: yields (its name, text). A stream that breaks is
    opened again, behind what was read; if that fails too often, what was read is kept."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is told once, below
    count, waits = 0, list(RETRY_WAITS)
    while True:
        try:
            rows = datasets.load_dataset(FINEWEB, name="sample-10BT", split="train", streaming=True)
            for row in itertools.islice(rows, count, None):
                count, waits = count + 1, list(RETRY_WAITS)
                yield FINEWEB, text_of(row, text_column, FINEWEB)
            return
        except ConfigError:
            raise
        except Exception as error:  # of the network, of `datasets`, of pyarrow
            if count == 0:
                raise ConfigError(f"{FINEWEB} cannot be read ({brief(error)}); check the network") from None
            if not waits:
                print(f"the stream ended after {count:,} documents: {brief(error)}; kept what was read")
                return
            print(f"the stream broke after {count:,} documents: {brief(error)}; going on in {waits[0]} s",
                  flush=True)
        time.sleep(waits.pop(0))


def open_source(source, text_column, held_out):
    """-> an iterator of (file, text), and two counts that begin here: documents read of each file, and
    documents dropped for each reason."""
    dropped = {"empty": 0, "duplicate": 0, "leak": 0}
    if source == "fineweb-edu":
        return fineweb_documents(text_column), {FINEWEB: 0}, dropped
    if source != "stdlib":
        files = local_files(source)
        return local_documents(files, text_column), dict.fromkeys(files, 0), dropped
    texts, dropped["leak"] = drop_leaks(list(dict.fromkeys(stdlib_documents())), held_out)
    return (("stdlib", text) for text in texts), {"stdlib": dropped["leak"]}, dropped


# -----------------------------------------------------------------------------
# tokens to disk

def parse_count(text):
    """'200M' -> 200000000; '' -> infinity."""
    if not text:
        return math.inf
    match = re.fullmatch(r"(\d+\.?\d*)([KMB]?)", text.upper())
    count = int(float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]]) if match else 0
    if count < 1:
        raise ConfigError(f"--tokens={text!r} is not a positive count; write 200M, 1.5B or 3000000")
    return count


def encode_stream(documents, enc, dtype, workers):
    """(file, text) -> yields (file, sha256 of the text, its ids and end-of-text), in order. `workers` threads
    tokenize, a bounded number of batches ahead; tokenizers let other threads run."""
    def encode(batch):
        return [(file, hashlib.sha256(text.encode()).digest(),
                 np.append(enc.encode(text).astype(dtype), dtype(enc.eot_token))) for file, text in batch]

    documents, ahead, pool = iter(documents), deque(), ThreadPoolExecutor(workers)
    try:
        while batch := list(itertools.islice(documents, 64)):
            ahead.append(pool.submit(encode, batch))
            if len(ahead) > 4 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_tokens(path, encoded, limit, read, dropped):
    """Write the documents in a row, none twice, until there are `limit` tokens -> {sha256 of a document: its
    tokens}, in order. Counts in `read` and `dropped`."""
    lengths, total = {}, 0
    began = shown = time.time()
    with open(path, "wb") as f:
        for file, digest, ids in encoded:
            read[file] += 1
            if len(ids) == 1:  # end-of-text alone
                dropped["empty"] += 1
                continue
            if digest in lengths:
                dropped["duplicate"] += 1
                continue
            f.write(ids)
            lengths[digest] = len(ids)
            total += len(ids)
            if total >= limit:
                break
            if time.time() - shown > 2:
                shown = time.time()
                speed = total / (shown - began)
                left = f", {(limit - total) / speed:.0f} s left" if limit < math.inf else ""
                print(f"{total / 1e6:.1f}M tokens, {speed / 1e6:.2f}M tokens/s{left}", flush=True)
    return lengths


def split_of(digest, held_out):
    """A document's sha256 -> train, val or test."""
    u = int.from_bytes(digest[:8], "big") / 2 ** 64
    if u < held_out:
        return "val"
    if u < 2 * held_out:
        return "test"
    return "train"


def split_ranges(lengths, held_out):
    """{sha256: tokens} -> ("by document", {split: [(first token, last + 1) of each document]}), or ("by
    position", {split: [one range]}) where the hashes would leave too little to val or test."""
    ranges, total = {split: [] for split in SPLITS}, 0
    for digest, length in lengths.items():
        ranges[split_of(digest, held_out)].append((total, total + length))
        total += length
    shortest = min(sum(end - start for start, end in ranges[split]) for split in ("val", "test"))
    if len(lengths) >= FEW_DOCUMENTS and shortest >= FEW_TOKENS:
        return "by document", ranges
    held = int(total * HELD_OUT_BY_POSITION)
    cuts = 0, total - 2 * held, total - held, total
    return "by position", {split: [cuts[i:i + 2]] for i, split in enumerate(SPLITS)}


def write_split(path, tokens, ranges, eot_token):
    """Write those ranges of `tokens` -> what meta.json says of the file."""
    digest, count, documents = hashlib.sha256(), 0, 0
    with open(path, "wb") as f:
        for start, end in ranges:
            f.write(tokens[start:end])
            digest.update(tokens[start:end])
            count += end - start
            documents += int((tokens[start:end] == eot_token).sum())
    return {"tokens": count, "documents": documents, "sha256": digest.hexdigest()}


def refuse_to_replace(final, overwrite):
    """Whatever is there already stays, unless it is data and --overwrite asks for it."""
    if not os.path.lexists(final):
        return
    if not overwrite:
        raise ConfigError(f"{final} exists already; name another with --name=NAME, or replace it with "
                          "--overwrite")
    ours = {"meta.json", "tokenizer.json", "train.bin", "val.bin", "test.bin"}
    if os.path.islink(final) or not os.path.isdir(final) or not set(os.listdir(final)) <= ours:
        raise ConfigError(f"{final} is or holds something other than data, which --overwrite would delete; "
                          "name another with --name=NAME, or move that away")


def prepare(source="stdlib", name="", tokens="", tokenizer_name="", text_column="text", workers=0,
            overwrite=False, root="data"):
    """Make data/<name>/ and return its meta. Raises ConfigError; no half-made folder stays."""
    began, limit, name = time.time(), parse_count(tokens), name or source
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ConfigError(f"--name={name!r} is not a plain folder name; give data/ one with --name=NAME, of "
                          "letters, digits and dashes")
    if workers < 0:
        raise ConfigError(f"--workers={workers} is negative; give 0 (one per core) or more")
    final, part = os.path.join(root, name), os.path.join(root, f".{name}.part")
    refuse_to_replace(final, overwrite)
    enc = tokenizer(tokenizer_name or ("bytes" if source == "stdlib" else "gpt2"))
    dtype = np.uint16 if enc.n_vocab <= 2 ** 16 else np.uint32
    held_out = HELD_OUT.get(source, HELD_OUT_ELSE)
    documents, read, dropped = open_source(source, text_column, held_out)
    encoded = encode_stream(documents, enc, dtype, workers or os.cpu_count())
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    try:
        os.makedirs(part)
        whole = os.path.join(part, "whole")
        lengths = write_tokens(whole, encoded, limit, read, dropped)
        total = sum(lengths.values())
        if total < 100:
            raise ConfigError(f"{source} gives {total} tokens, too few for three splits; give more text")
        way, ranges = split_ranges(lengths, held_out)
        everything = np.memmap(whole, dtype, "r")
        splits = {split: write_split(f"{part}/{split}.bin", everything, ranges[split], enc.eot_token)
                  for split in SPLITS}
        os.remove(whole)
        meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token,
                "eot_text": enc.eot_text, "dtype": np.dtype(dtype).name, "source": source, "split": way,
                "splits": splits, "read": read, "dropped": dropped, "python": sys.version.split()[0]}
        with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as f:
            json.dump(meta, f, indent=1)
        if enc.file:
            shutil.copyfile(enc.file, os.path.join(part, "tokenizer.json"))
        if os.path.exists(final):
            shutil.rmtree(final)
        os.replace(part, final)
    except OSError as error:
        raise ConfigError(f"cannot write {final} ({brief(error)})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{final}: {total:,} tokens of {len(lengths):,} documents in {time.time() - began:.1f} s, split "
          f"{way}; dropped: {', '.join(f'{count} {why}' for why, count in dropped.items())}")
    return meta


# -----------------------------------------------------------------------------
# reading

def load_data(name, block_size, root="data"):
    """data/<name>/ -> ({split: memmap of ids}, meta); a folder of nanoGPT's without meta.json is GPT-2 BPE.
    Of large files a sample is checked. Raises ConfigError that says what is wrong and what to do."""
    folder = os.path.join(root, name)
    if not os.path.isdir(folder):
        words = f"--source={name}" if name in ("stdlib", "fineweb-edu") else f"--source=FILES --name={name}"
        raise ConfigError(f"{folder} does not exist; make it with python prepare.py {words}")
    again = f"make it again with python prepare.py --source=... --name={name} --overwrite"
    meta, data = read_meta(folder, again), {}
    for split, facts in meta["splits"].items():
        path, dtype = os.path.join(folder, f"{split}.bin"), np.dtype(meta["dtype"])
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != facts["tokens"] * dtype.itemsize:
            raise ConfigError(f"{path} has {size} bytes, not the {facts['tokens'] * dtype.itemsize} of its "
                              f"{facts['tokens']} tokens: it is truncated, or of other data; {again}")
        if facts["tokens"] < block_size + 1:
            raise ConfigError(f"{path} holds {facts['tokens']} tokens, fewer than block_size + 1 = "
                              f"{block_size + 1}; give more text or a smaller --block_size")
        data[split] = np.memmap(path, dtype, "r")
        largest = int(max(data[split][:100_000].max(), data[split][-100_000:].max()))  # a sample of them
        if largest >= meta["vocab_size"]:
            raise ConfigError(f"{path} holds the token id {largest}, beyond the vocabulary of "
                              f"{meta['vocab_size']}; it was made with another tokenizer: {again}")
    return data, meta


def read_meta(folder, again):
    """meta.json, or what stands for it in a folder of nanoGPT's."""
    path = os.path.join(folder, "meta.json")
    if not os.path.exists(path):
        return nanogpt_meta(folder)
    try:
        with open(path, encoding="utf-8") as f:
            meta = json.load(f)
        facts = [meta["splits"]["train"], meta["splits"]["val"], *meta["splits"].values()]
        counts = [meta["vocab_size"], meta["eot_token"], *(each["tokens"] for each in facts)]
        texts = [meta["tokenizer"], *(each["sha256"] for each in facts)]
        right = {*map(type, counts)} == {int} and {*map(type, texts)} == {str}
        if right and meta["dtype"] in ("uint16", "uint32"):
            return meta
        why = "a field is of another type"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = brief(error)
    raise ConfigError(f"{path} is not as prepare.py writes it ({why}); {again}")


def nanogpt_meta(folder):
    """What stands for meta.json where nanoGPT's prepare.py wrote GPT-2 BPE in uint16. Other data is refused,
    as far as it can be told."""
    if os.path.exists(os.path.join(folder, "meta.pkl")):
        raise ConfigError(f"{folder} has nanoGPT's characters (meta.pkl), which are not read here; make it "
                          "again with python prepare.py --source=.../input.txt --name=NAME --tokenizer=bytes")
    splits = {}
    for split in ("train", "val"):
        path = os.path.join(folder, f"{split}.bin")
        if not os.path.exists(path) or os.path.getsize(path) < 2:
            raise ConfigError(f"{path} is missing or empty, and there is no meta.json; make the data again "
                              "with python prepare.py")
        data = np.memmap(path, np.uint8, "r")
        ids = np.frombuffer(data[:20_000].tobytes()[:len(data) // 4 * 4], np.uint16)
        if len(ids) and not ids[1::2].any():
            raise ConfigError(f"{path} looks like ids in uint32 or int64, not nanoGPT's uint16; write them "
                              "with numpy's astype('uint16'), or make the data with python prepare.py")
        # The whole may be large, and is never read: its size, beginning and end stand for it.
        digest = hashlib.sha256(b"%d" % len(data) + data[:2 ** 20].tobytes() + data[-2 ** 20:].tobytes())
        splits[split] = {"tokens": len(data) // 2, "sha256": digest.hexdigest()}
    return {"tokenizer": "gpt2", "vocab_size": 50257, "eot_token": 50256, "dtype": "uint16", "splits": splits}


class Batch(NamedTuple):
    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, the tokens that come next
    row_seeds: torch.Tensor  # (B,) int64, what is random about a row

    def to(self, device):
        return Batch(*(t.to(device) for t in self))

    def rows(self, index):
        return Batch(*(t[index] for t in self))


def get_batch(data, config, step, micro, machine):
    """This process's slice of a micro-step. The global batch is a function of (seed, step) alone, so a resume
    needs no saved position and one process equals many."""
    T, B, accumulate = config["block_size"], config["batch_size"], config["gradient_accumulation_steps"]
    rng = np.random.default_rng((config["seed"], step))
    starts = rng.integers(0, len(data) - T, B * accumulate)
    row_seeds = rng.integers(0, 2 ** 62, B * accumulate)
    b = B // machine.processes
    first = micro * B + machine.process * b
    return fetch(data, starts[first:first + b], T, row_seeds[first:first + b], machine.device)


def eval_batch(data, config, iters):
    """Fixed, evenly spaced rows of a split. No random state is touched."""
    T = config["block_size"]
    n = max(1, min(iters * config["batch_size"], (len(data) - 1) // T))
    starts = np.linspace(0, len(data) - 1 - T, n).astype(np.int64)
    return fetch(data, starts, T, np.arange(n), "cpu")


def fetch(data, starts, T, row_seeds, device):
    rows = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))  # one slice a row
    if device == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return Batch(rows[:, :-1], rows[:, 1:], torch.from_numpy(row_seeds).to(device, non_blocking=True))


def main():
    show_help_if_asked(sys.argv[1:], __file__)
    config, _ = configure(DEFAULTS, sys.argv[1:])
    config["tokenizer_name"] = config.pop("tokenizer")
    prepare(**config)


if __name__ == "__main__":
    exit_on_error(main)
