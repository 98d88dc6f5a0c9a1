"""Text -> tokens on disk: data/<name>/{train,val,test}.bin (uint16, as nanoGPT reads them) and meta.json.

    python prepare.py                                         the English inside CPython, as bytes, no network
    python prepare.py --source=fineweb-edu --tokens=200M      streams HuggingFaceFW/fineweb-edu, GPT-2 BPE
    python prepare.py --source='my/*.parquet' --name=my-text  local .parquet, .jsonl or .txt files, GPT-2 BPE

A document's split follows from its hash alone, whatever its place and the number of workers. Its place says
where in its split it stands and, with --tokens, whether it is read at all: the files are read in the order of
their names, up to that count. Exact duplicates are dropped. Documents end with the end-of-text token. The
folder appears whole or not at all; its meta.json says how many documents were read from which file.
"""
import ast
import errno
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
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from configurator import ConfigError, configure, did_you_mean, exit_on_error

import numpy as np
import tiktoken
import torch

from runs.files import read_json, sync

DEFAULTS = dict(
    source="stdlib",  # stdlib, fineweb-edu, or local .parquet, .jsonl or .txt files: a name or a glob
    name="",  # the folder under data/; by default the source's name
    tokens="",  # stop at this count, such as 200M; by default all there is
    tokenizer="",  # bytes or gpt2; by default bytes for stdlib, gpt2 otherwise
    workers=0,  # tokenizing threads; 0 is one per core
    overwrite=False,
)
SPLITS = ("train", "val", "test")
FINEWEB = "HuggingFaceFW/fineweb-edu"
HELD_OUT = {"stdlib": 0.05}  # the share of documents that val and test get, each
HELD_OUT_ELSE = 0.01
WINDOW = 64  # bytes; see drop_leaks


def tokenizer(name):
    """`bytes` or `gpt2` -> a tiktoken.Encoding whose largest id is end-of-text."""
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 256})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' or urllib's, whichever tiktoken uses
            raise ConfigError(f"tiktoken cannot fetch the gpt2 vocabulary ({type(error).__name__}); go "
                              "online once, or point TIKTOKEN_CACHE_DIR at a folder that has it") from None
    raise ConfigError(f"tokenizer {name!r} is unknown; {did_you_mean(name, ['bytes', 'gpt2'])}")


def piece(token, enc):
    """A token id as text; a part of a character shows as the replacement mark."""
    return enc.decode_single_token_bytes(token).decode("utf-8", "replace")


# -----------------------------------------------------------------------------
# sources

def stdlib_documents():
    """The English inside every CPython: `pydoc_data`'s topics, and the standard library's docstrings."""
    from pydoc_data.topics import topics
    yield from topics.values()
    lib = sysconfig.get_path("stdlib")
    for path in sorted(glob.glob(f"{glob.escape(lib)}/**/*.py", recursive=True)):
        folders = set(os.path.relpath(path, lib).split(os.sep))
        if folders & {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}:
            continue
        try:
            with open(path, "rb") as f:
                tree = ast.parse(f.read())
        except (SyntaxError, ValueError, OSError):
            continue  # lib2to3 ships a few files of Python 2
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def text_of(row, where):
    """The text of a row {column: value}."""
    text = row.get("text")
    if not isinstance(text, str):
        raise ConfigError(f"{where}: a row has no `text` (it has {', '.join(map(str, row))}); rename the "
                          "column that holds the text, and leave out rows without one")
    return text


def fineweb_documents():
    """fineweb-edu, streamed by Hugging Face `datasets`: yields (its name, text)."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is told once, below
    try:
        rows = datasets.load_dataset(FINEWEB, name="sample-10BT", split="train", streaming=True)
        for row in rows:
            yield FINEWEB, text_of(row, FINEWEB)
    except ConfigError:
        raise
    except Exception as error:  # of the network, of `datasets`, of pyarrow
        raise ConfigError(f"{FINEWEB} cannot be read ({type(error).__name__}: {error}); check the "
                          "network") from None


def read_parquet(path):
    import pyarrow.parquet
    with open(path, "rb") as f, pyarrow.parquet.ParquetFile(f) as table:
        names = table.schema_arrow.names
        if "text" not in names:
            text_of(dict.fromkeys(names), path)
        for batch in table.iter_batches(256, columns=["text"]):
            for text in batch.column("text").to_pylist():
                yield text_of({"text": text}, path)


def read_jsonl(path):
    with open(path, encoding="utf-8-sig", newline="\n") as f:
        for number, line in enumerate(f, 1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number} is not JSON ({error}); mend or leave out that "
                                  "line") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number} holds no object; write lines such as "
                                  '{"text": "..."}')
            yield text_of(row, f"{path}, line {number}")


def read_txt(path):
    with open(path, encoding="utf-8-sig") as f:
        yield f.read()


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".txt": read_txt}  # each yields texts


def kind_of(path):
    return os.path.splitext(path)[1].lower()


def local_files(source):
    """A file's name or a glob -> the files, sorted. A name that exists is meant literally, with brackets."""
    files = [source]
    if not os.path.isfile(source):
        files = sorted({path for path in glob.glob(source, recursive=True) if not os.path.isdir(path)})
    if not files:
        raise ConfigError(f"--source={source!r} matches no file; name stdlib, fineweb-edu or a glob of "
                          ".parquet, .jsonl or .txt")
    kinds = {kind_of(path) for path in files}
    if len(kinds) > 1 or not kinds <= READERS.keys():
        raise ConfigError(f"--source={source!r} matches files of kind {', '.join(sorted(kinds))}; name files "
                          "of one kind: parquet, jsonl or txt")
    return files


def local_documents(files):
    """Yields (file, text): one text for each row, or for each .txt file."""
    for path in files:
        try:
            for text in READERS[kind_of(path)](path):
                yield path, text
        except ConfigError:
            raise
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 ({error}); convert it or leave it out") from None
        except Exception as error:  # of the file system, of pyarrow
            raise ConfigError(f"{path} cannot be read ({type(error).__name__}: {error}); mend it or leave it "
                              "out") from None


def open_source(source, held_out):
    """-> an iterator of (file, text), and two counts that begin here: documents read of each file, and
    documents dropped for each reason."""
    dropped = {"empty": 0, "duplicate": 0, "leak": 0}
    if source == "fineweb-edu":
        return fineweb_documents(), {FINEWEB: 0}, dropped
    if source != "stdlib":
        files = local_files(source)
        return local_documents(files), dict.fromkeys(files, 0), dropped
    texts, dropped["leak"] = drop_leaks(list(dict.fromkeys(stdlib_documents())), held_out)
    return (("stdlib", text) for text in texts), {"stdlib": dropped["leak"]}, dropped


# -----------------------------------------------------------------------------
# documents to tokens

def split_of(digest, held_out):
    """A document's sha256 -> train, val or test."""
    u = int.from_bytes(digest[:8], "big") / 2 ** 64
    if u < held_out:
        return "val"
    if u < 2 * held_out:
        return "test"
    return "train"


def drop_leaks(documents, held_out):
    """Drop the val and test documents that share a 64-byte window with a train document: docstrings repeat.
    Returns the documents kept and the count dropped."""
    texts = [document.encode() for document in documents]
    splits = [split_of(hashlib.sha256(text).digest(), held_out) for text in texts]
    trained = set()
    for text, split in zip(texts, splits):
        if split == "train":
            trained.update(windows(text))
    kept = [document for document, text, split in zip(documents, texts, splits)
            if split == "train" or trained.isdisjoint(windows(text))]
    return kept, len(documents) - len(kept)


def windows(text):
    """The hash of every 64 bytes in a row."""
    return (hash(text[i:i + WINDOW]) for i in range(len(text) - WINDOW + 1))


def parse_count(text):
    """'200M' -> 200000000; '' -> infinity."""
    if not text:
        return math.inf
    scale = {"K": 10 ** 3, "M": 10 ** 6, "B": 10 ** 9}.get(text[-1].upper())
    try:
        count = float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        count = -1
    if not 1 <= count < math.inf:
        raise ConfigError(f"--tokens={text!r} is not a positive count; write 200M, 1.5B or 3000000")
    return int(count)


class Encoded(NamedTuple):
    """A document on its way to the disk."""
    file: str
    split: str
    digest: bytes  # sha256 of its text
    ids: np.ndarray  # uint16, with end-of-text


def encode(documents, enc, held_out):
    """[(file, text)] -> [Encoded]"""
    encoded = []
    for file, text in documents:
        data = text.encode("utf-8", "replace")  # a lone surrogate has no UTF-8
        digest = hashlib.sha256(data).digest()
        ids = enc.encode_to_numpy(data.decode(), disallowed_special=())
        ids = np.append(ids, enc.eot_token).astype(np.uint16)
        encoded.append(Encoded(file, split_of(digest, held_out), digest, ids))
    return encoded


def encode_stream(documents, enc, workers, held_out):
    """Yields the documents (file, text) as Encoded, in order, tokenized by `workers` threads (tiktoken
    releases the GIL), a bounded number of batches ahead."""
    documents = iter(documents)
    pool = ThreadPoolExecutor(workers)
    ahead = deque()
    try:
        while batch := list(itertools.islice(documents, 64)):
            ahead.append(pool.submit(encode, batch, enc, held_out))
            if len(ahead) > 4 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# tokens to disk

class SplitFiles:
    """train.bin, val.bin and test.bin while they are written, and what went into each."""

    def __init__(self, folder):
        self.paths = {split: os.path.join(folder, f"{split}.bin") for split in SPLITS}
        self.files = {split: open(path, "wb") for split, path in self.paths.items()}
        self.hashes = {split: hashlib.sha256() for split in SPLITS}
        self.tokens = dict.fromkeys(SPLITS, 0)
        self.documents = dict.fromkeys(SPLITS, 0)

    def add(self, split, ids):
        data = ids.tobytes()
        self.files[split].write(data)
        self.hashes[split].update(data)
        self.tokens[split] += len(ids)
        self.documents[split] += 1

    def close(self):
        for file in self.files.values():
            file.close()

    def facts(self):
        return {split: {"tokens": self.tokens[split], "documents": self.documents[split],
                        "sha256": self.hashes[split].hexdigest()} for split in SPLITS}


def write_splits(folder, documents, limit, read, dropped):
    """Write the Encoded documents, none twice, until there are `limit` tokens -> {split: facts}. Counts in
    `read` and `dropped`."""
    splits, seen, total = SplitFiles(folder), set(), 0
    began = shown = time.time()
    try:
        for file, split, digest, ids in documents:
            read[file] += 1
            if len(ids) == 1:  # end-of-text alone
                dropped["empty"] += 1
                continue
            if digest[:16] in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(digest[:16])
            splits.add(split, ids)
            total += len(ids)
            if time.time() - shown > 2:
                shown = time.time()
                show_progress(total, limit, shown - began)
            if total >= limit:
                break
    finally:
        splits.close()
    return splits.facts()


def show_progress(total, limit, seconds):
    left = ""
    if limit < math.inf:
        left = f", {(limit - total) * seconds / total:.0f} s left"
    print(f"{total / 1e6:.1f}M tokens, {total / seconds / 1e6:.2f}M tokens/s{left}", flush=True)


def refuse_empty_splits(facts, source, held_out):
    empty = [split for split in ("train", "val") if not facts[split]["tokens"]]
    if empty:
        count = sum(split["documents"] for split in facts.values())
        raise ConfigError(f"{source}: no document in {' and '.join(empty)} (of {count}); give more "
                          f"documents, about {2 / held_out:.0f} at least, since each goes to a split by its "
                          "hash")


# -----------------------------------------------------------------------------
# the folder: whole or not at all

def folder_name(source, name):
    if not name:
        if source not in ("stdlib", "fineweb-edu"):
            raise ConfigError(f"--source={source!r} needs a name; add --name=NAME for the folder under data/")
        return source
    if os.path.basename(name) != name or name.startswith("."):
        raise ConfigError(f"--name={name!r} is not a plain folder name; use letters, digits and dashes")
    return name


def refuse_to_replace(final, overwrite):
    """Whatever is there already stays, unless it is data and --overwrite asks for it."""
    if not os.path.lexists(final):
        return
    other = "name another with --name=NAME"
    if not overwrite:
        raise ConfigError(f"{final} exists already; {other}, or replace it with --overwrite")
    if os.path.islink(final):
        raise ConfigError(f"{final} is a symbolic link to {os.readlink(final)!r}, which --overwrite does not "
                          f"replace; {other}, or remove the link yourself")
    if not os.path.isdir(final):
        raise ConfigError(f"{final} is a file, which --overwrite does not replace; {other}")
    strangers = set(os.listdir(final)) - {"meta.json"} - {f"{split}.bin" for split in SPLITS}
    if strangers:
        raise ConfigError(f"{final} holds {sorted(strangers)[0]!r} too, which --overwrite would delete; "
                          f"{other}, or move that away")


def clear_killed(root, name):
    """Remove what killed processes left; the old folder, if one died while replacing it, goes back to its
    place."""
    pattern = re.compile(rf"\.{re.escape(name)}\.(\d+)\.part(\.old)?")
    final = os.path.join(root, name)
    for left in glob.glob(os.path.join(glob.escape(root), f".{glob.escape(name)}.*.part*")):
        match = pattern.fullmatch(os.path.basename(left))
        if not match or is_at_work(int(match[1])):
            continue
        if match[2] and not os.path.lexists(final):
            os.replace(left, final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def is_at_work(pid):
    """Is this another process, and alive? In a container every run may have the same number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def publish(part, final, overwrite):
    """Give the finished folder its name, so that a crash of the machine leaves the old one or the new one."""
    for name in os.listdir(part):
        sync(os.path.join(part, name))
    sync(part)
    refuse_to_replace(final, overwrite)  # another process may have been faster
    old = part + ".old"
    if os.path.isdir(final):
        os.replace(final, old)
    try:
        os.replace(part, final)
    except BaseException:
        if os.path.isdir(old):
            os.replace(old, final)
        raise
    sync(os.path.dirname(final) or ".")
    shutil.rmtree(old, ignore_errors=True)


def what_helps(error, root):
    """The advice after a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space and run this again"
    if not os.path.isdir(root):
        return f"the folder {root} is missing, so make it or what it links to"
    return f"make {root} a folder that can be written"


def prepare(source="stdlib", name="", tokens="", tokenizer_name="", workers=0, overwrite=False, root="data"):
    """Make data/<name>/ and return its meta. Raises ConfigError; no half-made folder stays."""
    started = time.time()
    limit = parse_count(tokens)
    if workers < 0:
        raise ConfigError(f"--workers={workers} is negative; give 0 (one per core) or more")
    name = folder_name(source, name)
    final, part = os.path.join(root, name), os.path.join(root, f".{name}.{os.getpid()}.part")
    if not tokenizer_name:
        tokenizer_name = "bytes" if source == "stdlib" else "gpt2"
    try:
        clear_killed(root, name)
        refuse_to_replace(final, overwrite)
        enc = tokenizer(tokenizer_name)
        held_out = HELD_OUT.get(source, HELD_OUT_ELSE)
        documents, read, dropped = open_source(source, held_out)
        encoded = encode_stream(documents, enc, workers or os.cpu_count(), held_out)
        os.makedirs(part)
        facts = write_splits(part, encoded, limit, read, dropped)
        refuse_empty_splits(facts, source, held_out)
        meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token,
                "dtype": "uint16", "source": source, "splits": facts, "read": read, "dropped": dropped,
                "python": sys.version.split()[0]}
        with open(os.path.join(part, "meta.json"), "w", encoding="utf-8") as f:
            json.dump(meta, f, indent=1)
        publish(part, final, overwrite)
    except OSError as error:
        raise ConfigError(f"cannot write {final}: {error.strerror or error}; "
                          f"{what_helps(error, root)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    show_made(final, meta, time.time() - started)
    return meta


def show_made(final, meta, seconds):
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    documents = sum(split["documents"] for split in meta["splits"].values())
    dropped = ", ".join(f"{count} {why}" for why, count in meta["dropped"].items())
    print(f"{final}: {tokens:,} tokens of {documents:,} documents in {seconds:.1f} s "
          f"({tokens / seconds / 1e6:.2f}M tokens/s); dropped: {dropped}")


# -----------------------------------------------------------------------------
# reading

NANOGPT_META = {"tokenizer": "gpt2", "vocab_size": 50257, "eot_token": 50256, "dtype": "uint16"}
META_FIELDS = {"tokenizer": str, "vocab_size": int, "eot_token": int, "dtype": str, "splits": dict}


def load_data(name, block_size, root="data"):
    """data/<name>/ -> ({split: uint16 memmap}, meta), checked whole. A folder of nanoGPT's without meta.json
    (train and val) is read as GPT-2 BPE. Raises ConfigError that says what is wrong and what to do."""
    folder = os.path.join(root, name)
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} does not exist; make it with python prepare.py --source=... "
                          f"--name={name}")
    again = f"make it again with python prepare.py --name={name} --overwrite"
    meta = read_meta(os.path.join(folder, "meta.json"), again)
    data = {}
    for split in SPLITS:
        path = os.path.join(folder, f"{split}.bin")
        if not os.path.exists(path):
            if split == "test" and "test" not in meta["splits"]:
                continue  # nanoGPT's folders have no test split
            raise ConfigError(f"{path} is missing; {again}")
        data[split], facts = read_split(path, block_size, meta["vocab_size"], again)
        described = meta["splits"].setdefault(split, facts)
        for field, value in facts.items():
            if described.get(field) != value:
                raise ConfigError(f"{path} is not what meta.json describes: its {field} is {value!r}, not "
                                  f"{described.get(field)!r}; {again}")
    return data, meta


def read_meta(path, again):
    """meta.json, or what stands for it in a folder of nanoGPT's."""
    meta = read_json(path, META_FIELDS, again)
    if meta is None:
        return {**NANOGPT_META, "splits": {}}
    if meta["tokenizer"] not in ("bytes", "gpt2"):
        raise ConfigError(f"{path}: tokenizer is {meta['tokenizer']!r}, which is unknown; {again}")
    if meta["dtype"] != "uint16":
        raise ConfigError(f"{path}: dtype is {meta['dtype']!r}, not 'uint16'; {again}")
    if not 0 < meta["vocab_size"] <= 65536:
        raise ConfigError(f"{path}: vocab_size is {meta['vocab_size']}, not between 1 and 65536; {again}")
    for split in sorted({"train", "val", *meta["splits"]}):
        if not isinstance(meta["splits"].get(split), dict):
            raise ConfigError(f"{path}: splits has no facts of {split}; {again}")
    return meta


def read_split(path, block_size, vocab_size, again):
    """-> (the tokens as a uint16 memmap, what meta.json should say of them)."""
    try:
        size = os.path.getsize(path)
        if size % 2:
            raise ConfigError(f"{path} has an odd number of bytes ({size}): it is truncated; {again}")
        if size < 2 * (block_size + 1):
            raise ConfigError(f"{path} holds {size // 2} tokens, fewer than block_size + 1 = "
                              f"{block_size + 1}; give more text or a smaller --block_size")
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        digest = hashlib.sha256(tokens).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    largest = int(tokens.max())
    if largest >= vocab_size:
        raise ConfigError(f"{path} holds the token id {largest}, beyond the vocabulary of {vocab_size}; it "
                          f"was made with another tokenizer: {again}")
    return tokens, {"tokens": size // 2, "sha256": digest}


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
    config = configure(DEFAULTS, sys.argv[1:])
    prepare(config["source"], config["name"], config["tokens"], config["tokenizer"], config["workers"],
            config["overwrite"])


if __name__ == "__main__":
    exit_on_error(main)
