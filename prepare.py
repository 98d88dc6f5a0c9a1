"""Text -> tokens on disk: data/<name>/{train,val,test}.bin (uint16, as nanoGPT reads them) and meta.json.

    python prepare.py                                              the English inside CPython, byte-level, no network
    python prepare.py --source=fineweb-edu --tokens=200M           streams HuggingFaceFW/fineweb-edu, GPT-2 BPE
    python prepare.py --source='my/*.parquet' --name=mine          local parquet, jsonl or txt files, GPT-2 BPE

A document's split follows from its hash alone, so order and number of workers change nothing; exact duplicates
are dropped. Documents end with the end-of-text token. The folder appears whole or not at all.
"""
import ast
import contextlib
import glob
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import sysconfig
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken
import torch

from configurator import ConfigError, configure, did_you_mean, exit_on_error

DEFAULTS = dict(
    source="stdlib",  # stdlib, fineweb-edu, or a glob of local .parquet, .jsonl or .txt files
    name="",  # the folder under data/; by default the source's name
    tokens="",  # stop at this count, such as 200M; by default all there is
    tokenizer="",  # bytes or gpt2; by default bytes for stdlib, gpt2 otherwise
    workers=0,  # tokenizing threads; 0 is one per core
    overwrite=False,
)
HELD_OUT = {"stdlib": 0.05}  # the share of documents that val and test get, each
HELD_OUT_ELSE = 0.01
WINDOW = 64  # bytes; see drop_leaks


def tokenizer(name):
    """`bytes` or `gpt2` -> a tiktoken.Encoding whose largest id is end-of-text."""
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if name == "gpt2":
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' or urllib's, whichever tiktoken uses
            raise ConfigError(f"tiktoken cannot fetch the gpt2 vocabulary ({type(error).__name__}); go online once, or "
                              "point TIKTOKEN_CACHE_DIR at a folder that has it") from None
    raise ConfigError(f"tokenizer {name!r} is unknown; {did_you_mean(name, ['bytes', 'gpt2'])}")


def piece(token, enc):
    """A token id as text; a part of a character shows as the replacement mark."""
    return enc.decode_single_token_bytes(token).decode("utf-8", "replace")


# -----------------------------------------------------------------------------
# sources: each yields documents as str

def stdlib_documents():
    """The English inside every CPython: the `pydoc_data` topics, and the docstrings of the standard library."""
    from pydoc_data.topics import topics
    yield from topics.values()
    lib = sysconfig.get_path("stdlib")
    for path in sorted(glob.glob(f"{lib}/**/*.py", recursive=True)):
        parts = set(os.path.relpath(path, lib).split(os.sep))
        if parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}:
            continue
        try:
            with open(path, "rb") as f:
                tree = ast.parse(f.read())
        except (SyntaxError, ValueError, OSError):
            continue  # lib2to3 ships a few files of Python 2
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def dataset_documents(source):
    """fineweb-edu, or a glob of local files, through Hugging Face `datasets`: one `text` per row or txt file."""
    import datasets
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error is told once, by us
    if source == "fineweb-edu":
        rows = datasets.load_dataset("HuggingFaceFW/fineweb-edu", name="sample-10BT", split="train", streaming=True)
    else:
        files = sorted(glob.glob(source, recursive=True))
        if not files:
            raise ConfigError(f"--source={source!r} matches no file; name stdlib, fineweb-edu or a glob of .parquet, .jsonl or .txt")
        kinds = {os.path.splitext(f)[1].lower().replace(".jsonl", ".json").lstrip(".") for f in files}
        if len(kinds) != 1 or not kinds <= {"parquet", "json", "txt"}:
            raise ConfigError(f"--source={source!r} matches files of kind {sorted(kinds)}; name files of one kind: parquet, jsonl or txt")
        kind = kinds.pop()
        if kind == "txt":
            rows = datasets.load_dataset("text", data_files=files, split="train", streaming=True, sample_by="document")
        else:
            rows = datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ConfigError(f"{source}: a row has no `text` (it has {', '.join(map(str, row))}); rename the column that holds the text")
        yield row["text"]


def checked(documents, source):
    """The same documents; whatever goes wrong in reading them is one ConfigError."""
    try:
        yield from documents
    except ConfigError:
        raise
    except Exception as error:  # of pyarrow, of the network, of the encoding
        raise ConfigError(f"--source={source!r} cannot be read ({type(error).__name__}: {error}); mend or leave out that file, or check the network") from None


# -----------------------------------------------------------------------------

def split_of(digest, held_out):
    """A document's sha256 -> train, val or test."""
    u = int.from_bytes(digest[:8], "big") / 2 ** 64
    return "val" if u < held_out else "test" if u < 2 * held_out else "train"


def drop_leaks(documents, held_out):
    """Drop the val and test documents that share a 64-byte window with a train document: docstrings repeat.
    Returns the documents kept and the count dropped."""
    texts = [d.encode() for d in documents]
    splits = [split_of(hashlib.sha256(t).digest(), held_out) for t in texts]
    windows = lambda t: (hash(t[i:i + WINDOW]) for i in range(len(t) - WINDOW + 1))
    seen = set()
    for t, split in zip(texts, splits):
        if split == "train":
            seen.update(windows(t))
    kept = [d for d, t, split in zip(documents, texts, splits) if split == "train" or seen.isdisjoint(windows(t))]
    return kept, len(documents) - len(kept)


def parse_count(text):
    """'200M' -> 200000000; '' -> infinity."""
    if not text:
        return math.inf
    scale = {"K": 10 ** 3, "M": 10 ** 6, "B": 10 ** 9}.get(text[-1].upper(), 1)
    try:
        count = float(text if scale == 1 else text[:-1]) * scale
    except ValueError:
        count = -1
    if not 0 < count < math.inf:
        raise ConfigError(f"--tokens={text!r} is not a positive count; write 200M, 1.5B or 3000000")
    return int(count)


def encode_stream(documents, enc, workers, held_out):
    """Documents -> (split, digest, ids with end-of-text) in order, tokenized by `workers` threads (tiktoken
    releases the GIL), a bounded number of batches ahead."""
    def encode(batch):
        out = []
        for text in batch:
            data = text.encode("utf-8", "replace")  # a lone surrogate has no UTF-8
            digest = hashlib.sha256(data).digest()
            ids = enc.encode_to_numpy(data.decode(), disallowed_special=())
            out.append((split_of(digest, held_out), digest, np.append(ids, enc.eot_token).astype(np.uint16)))
        return out

    stream = iter(documents)
    batches = iter(lambda: list(itertools.islice(stream, 64)), [])
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        try:
            for batch in batches:
                ahead.append(pool.submit(encode, batch))
                if len(ahead) > 4 * workers:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def clear_killed(root, name, final):
    """Remove what killed processes left; the old folder, if one died while replacing it, goes back to its place."""
    for left in glob.glob(os.path.join(glob.escape(root), f".{glob.escape(name)}.*.part*")):
        try:
            pid = int(left.removesuffix(".old").split(".")[-2])
            if pid != os.getpid() and os.kill(pid, 0) is None:
                continue  # alive, so it is still at work
        except (ValueError, OSError):
            pass
        if left.endswith(".old") and not os.path.exists(final):
            os.replace(left, final)
        else:
            shutil.rmtree(left, ignore_errors=True)


def prepare(source="stdlib", name="", tokens="", tokenizer_name="", workers=0, overwrite=False, root="data"):
    """Make data/<name>/ and return its meta. Raises ConfigError; whatever happens, no half-made folder stays."""
    limit = parse_count(tokens)
    if workers < 0:
        raise ConfigError(f"--workers={workers} is negative; give 0 (one per core) or more")
    if not name:
        if source not in ("stdlib", "fineweb-edu"):
            raise ConfigError(f"--source={source!r} needs a name; add --name=NAME for the folder under data/")
        name = source
    final = os.path.join(root, name)
    if os.path.basename(name) != name or name.startswith("."):
        raise ConfigError(f"--name={name!r} is not a plain folder name; use letters, digits and dashes")
    clear_killed(root, name, final)
    if os.path.exists(final) and not overwrite:
        raise ConfigError(f"{final} exists already; name another with --name=NAME, or replace it with --overwrite")
    enc = tokenizer(tokenizer_name or ("bytes" if source == "stdlib" else "gpt2"))
    held_out = HELD_OUT.get(source, HELD_OUT_ELSE)
    dropped = {"empty": 0, "duplicate": 0, "leak": 0}
    if source == "stdlib":
        documents, dropped["leak"] = drop_leaks(list(dict.fromkeys(stdlib_documents())), held_out)
    else:
        documents = checked(dataset_documents(source), source)

    part = os.path.join(root, f".{name}.{os.getpid()}.part")
    start, seen = time.time(), set()
    counts = {s: {"tokens": 0, "documents": 0} for s in ("train", "val", "test")}
    hashes = {s: hashlib.sha256() for s in counts}
    try:
        os.makedirs(part)
        with contextlib.ExitStack() as stack:
            files = {s: stack.enter_context(open(os.path.join(part, f"{s}.bin"), "wb")) for s in counts}
            total, shown = 0, start
            for split, digest, ids in encode_stream(documents, enc, workers or os.cpu_count(), held_out):
                if len(ids) == 1 or digest[:16] in seen:
                    dropped["empty" if len(ids) == 1 else "duplicate"] += 1
                    continue
                seen.add(digest[:16])
                data = ids.tobytes()
                files[split].write(data)
                hashes[split].update(data)
                counts[split]["tokens"] += len(ids)
                counts[split]["documents"] += 1
                total += len(ids)
                if time.time() - shown > 2:
                    shown = time.time()
                    left = f", {(limit - total) * (shown - start) / total:.0f} s left" if limit < math.inf else ""
                    print(f"{total / 1e6:.1f}M tokens, {total / (shown - start) / 1e6:.2f}M tokens/s{left}", flush=True)
                if total >= limit:
                    break
        empty = [s for s in ("train", "val") if not counts[s]["tokens"]]
        if empty:
            raise ConfigError(f"{source}: no document in {' and '.join(empty)} (of {len(seen)}); give more documents, "
                              f"about {2 / held_out:.0f} at least, since each goes to a split by its hash")
        meta = {"tokenizer": enc.name, "vocab_size": enc.n_vocab, "eot_token": enc.eot_token, "dtype": "uint16",
                "source": source, "splits": {s: {**counts[s], "sha256": hashes[s].hexdigest()} for s in counts},
                "dropped": dropped, "python": sys.version.split()[0]}
        with open(os.path.join(part, "meta.json"), "w") as f:
            json.dump(meta, f, indent=1)
        if overwrite and os.path.exists(final):
            os.replace(final, part + ".old")
        os.replace(part, final)
    except OSError as error:
        raise ConfigError(f"cannot write {final}: {error.strerror or error}; free space or choose a folder that can be written") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(part + ".old", ignore_errors=True)
    seconds = time.time() - start
    print(f"{final}: {total:,} tokens of {len(seen):,} documents in {seconds:.1f} s ({total / seconds / 1e6:.2f}M tokens/s); dropped {dropped}")
    return meta


# -----------------------------------------------------------------------------
# reading

def load_data(name, block_size, root="data"):
    """data/<name>/ -> ({split: uint16 memmap}, meta), checked whole. A folder of nanoGPT's without meta.json
    (train and val) is read as GPT-2 BPE. Raises ConfigError that says what is wrong and what to do."""
    folder = os.path.join(root, name)
    again = f"make it again with python prepare.py --name={name} --overwrite"
    if not os.path.isdir(folder):
        raise ConfigError(f"{folder} does not exist; make it with python prepare.py --source=... --name={name}")
    path = os.path.join(folder, "meta.json")
    meta = {"tokenizer": "gpt2", "vocab_size": 50257, "eot_token": 50256, "splits": {}}
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as f:
                meta = json.load(f)
            tokenizer_name, vocab, listed = meta["tokenizer"], meta["vocab_size"], dict(meta["splits"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is broken ({type(error).__name__}: {error}); {again}") from None
        if tokenizer_name not in ("bytes", "gpt2"):
            raise ConfigError(f"{path} names the tokenizer {tokenizer_name!r}, which is unknown; {again}")
        if meta.get("dtype") != "uint16" or type(vocab) is not int or not 0 < vocab <= 65536 or not {"train", "val"} <= set(listed):
            raise ConfigError(f"{path} is broken (dtype {meta.get('dtype')!r}, vocab_size {vocab!r}, splits {sorted(listed)}); {again}")
    data = {}
    for split in ("train", "val", "test"):
        path = os.path.join(folder, f"{split}.bin")
        if not os.path.exists(path):
            if split == "test" and "test" not in meta["splits"]:
                continue  # nanoGPT's folders have no test split
            raise ConfigError(f"{path} is missing; {again}")
        try:
            size = os.path.getsize(path)
            if size % 2:
                raise ConfigError(f"{path} has an odd number of bytes ({size}): it is truncated; {again}")
            if size < 2 * (block_size + 1):
                raise ConfigError(f"{path} holds {size // 2} tokens, fewer than block_size + 1 = {block_size + 1}; "
                                  "give more text or a smaller --block_size")
            data[split] = np.memmap(path, dtype=np.uint16, mode="r")
            largest = int(data[split].max())
            if largest >= meta["vocab_size"]:
                raise ConfigError(f"{path} holds the token id {largest}, beyond the vocabulary of {meta['vocab_size']}; "
                                  f"it was made with another tokenizer: {again}")
            digest = hashlib.sha256(data[split]).hexdigest()
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
        known = meta["splits"].setdefault(split, {"tokens": size // 2, "sha256": digest})
        if not isinstance(known, dict) or (known.get("tokens"), known.get("sha256")) != (size // 2, digest):
            raise ConfigError(f"{path} is not what meta.json describes ({size // 2} tokens, sha256 {digest[:12]}); {again}")
    return data, meta


def get_batch(data, config, step, micro, machine):
    """This process's slice of a micro-step: x, y (b, T) int64 and a noise key per row (b,). The global batch is a
    function of (seed, step) alone, so a resume needs no saved position and one process equals many."""
    T, B, accumulate = config["block_size"], config["batch_size"], config["gradient_accumulation_steps"]
    rng = np.random.default_rng((config["seed"], step))
    starts = rng.integers(0, len(data) - T, B * accumulate)
    keys = rng.integers(0, 2 ** 62, B * accumulate)
    b = B // machine.world
    rows = slice(micro * B + machine.rank * b, micro * B + (machine.rank + 1) * b)
    return fetch(data, starts[rows], T, keys[rows], machine.device)


def eval_batch(data, config, iters):
    """Fixed, evenly spaced rows of a split: x, y (n, T), keys (n,). No random state is touched."""
    T = config["block_size"]
    n = max(1, min(iters * config["batch_size"], (len(data) - 1) // T))
    starts = np.linspace(0, len(data) - 1 - T, n).astype(np.int64)
    return fetch(data, starts, T, np.arange(n), "cpu")


def fetch(data, starts, T, keys, device):
    rows = torch.from_numpy(np.stack([data[i:i + T + 1] for i in starts]).astype(np.int64))  # one slice a row
    if device == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    return rows[:, :-1], rows[:, 1:], torch.from_numpy(np.asarray(keys)).to(device)


def main():
    config = configure(DEFAULTS, sys.argv[1:])
    prepare(config["source"], config["name"], config["tokens"], config["tokenizer"], config["workers"], config["overwrite"])


if __name__ == "__main__":
    exit_on_error(main)
