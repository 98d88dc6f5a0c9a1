"""Bad input: exit code 2, one line on stderr that names the value and a remedy, no traceback, nothing changed
on disk."""
import json
import os
import pickle
import shlex
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import prepare
import train
from configurator import ConfigError, configure, exit_on_error
from conftest import (HERE, checkpoint_of, finish, go, make_documents, recipe, script_words, snapshot, start,
                      summary_of, tiny)
from runs.options import validate

RUN, BACKBONE, DATA = Path("out/tiny/g3_full_aux/seed0"), Path("out/tiny/backbone/seed0"), Path("data/tiny")
G1 = Path("out/tiny/g1_full_aux/seed0")
DEFAULTS = train.configure_run([])[1]


# -----------------------------------------------------------------------------
# what goes wrong: each prepares the working directory, which has data/tiny, a backbone and finished runs of
# g1 and g3

def nothing(m):
    pass


def both(*preparations):
    def write(m):
        for prepared in preparations:
            prepared(m)
    return write


def written(path, content=b""):
    """Another file in the place of `path`, whose folder is made."""
    def write(m):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return write


def folder_at(path):
    """A folder in the place of the file `path`."""
    def write(m):
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True)
    return write


def gone(*paths):
    def remove(m):
        for path in paths:
            Path(path).unlink()
    return remove


def config_file(text):
    return written("bad.py", text)


def source(name, content):
    return written(f"texts/{name}", content)


def parquet(**columns):
    def write(m):
        Path("texts").mkdir()
        pyarrow.parquet.write_table(pyarrow.table(columns), "texts/a.parquet")
    return write


def cut(path, size=None):
    """`path` ends after `size` bytes, or in the middle."""
    def write(m):
        os.truncate(path, os.path.getsize(path) // 2 if size is None else size)
    return write


def copied(a, b):
    def write(m):
        shutil.copy(a, b)
    return write


def in_bytes(path, change):
    """Change the bytes of a file."""
    def write(m):
        Path(path).write_bytes(change(Path(path).read_bytes()))
    return write


def in_json(path, change):
    """Change the dict of a JSON file."""
    def write(m):
        value = json.loads(Path(path).read_text())
        change(value)
        Path(path).write_text(json.dumps(value))
    return write


def without(path, *names):
    """Drop a field of a JSON file, however deep."""
    def change(value):
        for name in names[:-1]:
            value = value[name]
        del value[names[-1]]
    return in_json(path, change)


def with_value(path, *names_and_value):
    *names, last, new = names_and_value

    def change(value):
        for name in names:
            value = value[name]
        value[last] = new
    return in_json(path, change)


def bin_cut(name, size):
    return in_bytes(DATA / name, lambda content: content[:size])


META = DATA / "meta.json"


def of_another_vocabulary(m):
    ids = np.fromfile(DATA / "train.bin", dtype=np.uint16)
    ids[7] = 300
    ids.tofile(DATA / "train.bin")


def unfinished(change=nothing, step=4):
    """A g3 run that has a checkpoint but no summary, so that the same command resumes it."""
    return both(gone(RUN / "summary.json"), change)


def in_checkpoint(path, change, keep_digest=False):
    """Change the dict of a checkpoint, as one who takes its digest away, or one who does not."""
    def write(m):
        checkpoint = torch.load(path, weights_only=True)
        if not keep_digest:
            checkpoint.pop("digest")
        change(checkpoint)
        torch.save(checkpoint, path)
    return write


def checkpoint_with(*names_and_value, path=RUN / "ckpt.pt", keep_digest=False):
    *names, last, new = names_and_value

    def change(value):
        for name in names:
            value = value[name]
        value[last] = new
    return in_checkpoint(path, change, keep_digest)


def checkpoint_without(*names, path=RUN / "ckpt.pt", keep_digest=False):
    def change(value):
        for name in names[:-1]:
            value = value[name]
        del value[names[-1]]
    return in_checkpoint(path, change, keep_digest)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def pickle_with_code(path):
    def write(m):
        torch.save({**torch.load(path, weights_only=True), "model": Code()}, path)
    return write


def bare_pickle_with_code(m):
    with open(RUN / "ckpt.pt", "wb") as f:
        pickle.dump({"model": Code(), "config": {}, "step": 1}, f)


def a_tensor_for_a_checkpoint(m):
    torch.save(torch.zeros(3), RUN / "ckpt.pt")


def unreadable(m):
    """ckpt.pt without the permission to read it: simulated, since root may read everything."""
    real = torch.load

    def load(path, *args, **options):
        if str(path).endswith("ckpt.pt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)
    m.setattr(torch, "load", load)


def other_width(m):
    go("train", *tiny(recipe("backbone"), "--n_embd=32", "--max_iters=1", "--out_dir=out/wide"))


def another_seed(change):
    """A run of seed 1 beside the one of seed 0, which is unfinished then."""
    def write(m):
        go("train", *tiny("--seed=1"))
        unfinished(change)(m)
    return write


SEED_1 = Path("out/tiny/g3_full_aux/seed1")


def gpt2_folder(weights, **changes):
    """A Hugging Face folder gpt2/ of a GPT-2 of our shape."""
    def write(m):
        Path("gpt2").mkdir()
        config = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 16,
                  "vocab_size": 257}
        Path("gpt2/config.json").write_text(json.dumps({**config, **changes}))
        if weights == "none of the names":
            from safetensors.torch import save_file
            save_file({"x": torch.zeros(1)}, "gpt2/model.safetensors")
        else:
            Path("gpt2/model.safetensors").write_bytes(weights)
    return write


def no_cuda(m):
    m.setattr(torch.cuda, "is_available", lambda: False)


def processes(**names):
    def write(m):
        for name, value in names.items():
            m.setenv(name, value)
        m.setattr(torch.distributed, "is_initialized", lambda: True)
    return write


def raising(error):
    def fail(*args, **options):
        raise error
    return fail


def no_gpt2(m):
    m.setattr(prepare.tiktoken, "get_encoding", raising(OSError("offline")))


def no_place_for_data(m):
    source("a.jsonl", LINES)(m)
    shutil.rmtree("data")
    os.symlink("/proc", "data")  # nobody can make a file there, not even root


def linked(path, target):
    def write(m):
        source("a.jsonl", LINES)(m)
        os.symlink(target, path)
    return write


LOCAL = "prepare --name=mine --tokenizer=bytes --source=texts/*"
WORDS = [{"text": t} for t in make_documents(3, train=3, held_out=1)]
LINES = "".join(json.dumps(r) + "\n" for r in WORDS)

# (the case, the command, what its line must say, what is wrong beforehand). {run}, {g1}, {backbone}: folders.
# A command of train.py or of the study gets the words of a tiny run besides.
CASES = [
    # config
    ("unknown key", "train --lerning_rate=1", ["lerning_rate", "did you mean 'learning_rate'"]),
    ("key far from any", "train --zzzzz=1", ["zzzzz", "known:"]),
    ("help", "train --help", ["help"]),
    ("two dashes", "train --", ["''", "known:"]),
    ("no key", "train --=1", ["''", "known:"]),
    ("an empty word", "train ''", ["''"]),
    ("a loss that does not exist", "train --lambda_utl=1", ["lambda_utl", "did you mean 'lambda_util'"]),
    ("a word for a number", "train --max_iters=ten", ["max_iters", "ten", "int"]),
    ("a float for an int", "train --max_iters=2.5", ["max_iters", "2.5", "int"]),
    ("a power for a number", "train --cheap_rank=10**12", ["cheap_rank", "10**12", "int"]),
    ("a bool for a number", "train --max_iters=True", ["max_iters", "True", "int"]),
    ("a text for a number", "train --max_iters=\"'6'\"", ["max_iters", "'6'", "int"]),
    ("a number for a list", "train --controlled=all", ["controlled", "all", "list"]),
    ("a number for a bool", "train --compile=1", ["compile", "1", "bool"]),
    ("a key without a value", "train --max_iters", ["max_iters", "--max_iters=VALUE"]),
    ("a key twice", "train --seed=1 --seed=2", ["--seed=2", "once"]),
    ("an empty value", "train --max_iters=", ["max_iters", "int"]),
    ("not a literal", "train --seed={[]:1}", ["seed", "int"]),
    ("a number beyond float", "train --learning_rate=1" + "0" * 400, ["learning_rate"]),
    ("infinite", "train --learning_rate=1e999", ["learning_rate", "inf", "finite"]),
    ("not a number", "train --learning_rate=nan", ["learning_rate", "nan"]),
    ("a negative rate", "train --gate_lr=-0.1", ["gate_lr", "-0.1", "0 or more"]),
    ("a negative loss weight", "train --lambda_util=-1", ["lambda_util", "-1", "0 or more"]),
    ("no steps", "train --max_iters=0", ["max_iters", "0", "1 or more"]),
    ("no rows", "train --batch_size=0", ["batch_size", "0", "1 or more"]),
    ("no layers", "train --n_layer=0", ["n_layer=0", "1 or more"]),
    ("no heads", "train --n_head=0", ["n_head=0", "1 or more"]),
    ("no width", "train --n_embd=0", ["n_embd=0", "1 or more"]),
    ("no context", "train --block_size=0", ["block_size=0", "1 or more"]),
    ("no cheap rank", "train --cheap_rank=0", ["cheap_rank=0", "1 or more"]),
    ("no latent", "train --latent=0", ["latent=0", "1 or more"]),
    ("no hidden", "train --g1_hidden=-1", ["g1_hidden=-1", "1 or more"]),
    ("no slices", "train --gradient_accumulation_steps=0", ["gradient_accumulation_steps=0", "1 or more"]),
    ("never an evaluation", "train --eval_interval=0", ["eval_interval=0", "1 or more"]),
    ("an evaluation of nothing", "train --eval_iters=0", ["eval_iters=0", "1 or more"]),
    ("a last evaluation of nothing", "train --final_eval_iters=0", ["final_eval_iters=0", "1 or more"]),
    ("never a log line", "train --log_interval=0", ["log_interval=0", "1 or more"]),
    ("no labelled layer", "train --label_layers=0", ["label_layers=0", "1 or more"]),
    ("a negative warmup", "train --warmup_iters=-1", ["warmup_iters=-1", "0 or more"]),
    ("a negative decay", "train --weight_decay=-1", ["weight_decay=-1", "0 or more"]),
    ("a negative clip", "train --grad_clip=-1", ["grad_clip=-1", "0 or more"]),
    ("a negative seed", "train --seed=-1", ["seed", "-1", "0 or more"]),
    ("a negative seed of the backbone", "train --backbone_seed=-1", ["backbone_seed=-1", "0 or more"]),
    ("a seed beyond 64 bits", "train --seed=99999999999999999999", ["seed", "beyond 64 bits"]),
    ("a negative number of threads", "train --threads=-2", ["threads", "-2", "0 or more"]),
    ("beta of 1", "train --beta1=1", ["beta1", "1"]),
    ("beta above 1", "train --beta2=1.1", ["beta2=1.1", "[0, 1]"]),
    ("a floor of the rate above 1", "train --min_lr_ratio=2", ["min_lr_ratio=2", "[0, 1]"]),
    ("portions above 1", "train --share_step=2", ["share_step=2", "[0, 1]"]),
    ("a backbone of no steps", "train --backbone_iters=0", ["0", "iters", "1 or more"]),
    ("a backbone of negative steps", "train --backbone_iters=-1", ["-1", "iters", "1 or more"]),
    ("a backbone of no rows", "train --backbone_batch_size=0", ["0", "batch_size", "1 or more"]),
    ("a backbone with a negative rate", "train --backbone_lr=-1", ["-1", "0 or more"]),
    ("a backbone with a negative rate of Muon", "train --backbone_muon_lr=-1", ["-1", "0 or more"]),
    ("heads that do not divide the width", "train --n_head=3", ["n_embd=16", "n_head=3", "multiple"]),
    ("a latent wider than the model", "train --latent=17", ["latent=17", "n_embd=16", "<="]),
    ("another config in the same place", "train --gate_lr=0.5", ["{run}", "gate_lr", "0.5", "--overwrite"]),
    ("no config file", "train config/g3_ful_aux.py",
     ["config/g3_ful_aux.py", "did you mean 'g3_full_aux.py'"]),
    ("no config file, a short option", "train -h", ["-h"]),
    ("a folder for a config file", "train out", ["out"]),
    ("syntax error", "train bad.py", ["bad.py", "key = value"], config_file("seed = = 3\n")),
    ("a program, not a config", "train bad.py", ["bad.py:1", "key = value"],
     config_file("import os\nos.mkdir('x')\n")),
    ("a call in a config", "train bad.py", ["bad.py:1", "seed", "literals"],
     config_file("seed = __import__('os').mkdir('executed')\n")),
    ("an attribute in a config", "train bad.py", ["bad.py:1", "seed", "literals"],
     config_file("seed = (1).bit_length()\n")),
    ("a power in a config", "train bad.py", ["bad.py:1", "seed", "Pow"],
     config_file("seed = 9 ** 9 ** 9 ** 9\n")),
    ("a shift in a config", "train bad.py", ["bad.py:1", "seed", "LShift"],
     config_file("seed = 1 << 10000000000\n")),
    ("a list as long as the memory", "train bad.py", ["bad.py:1", "controlled", "numbers"],
     config_file("controlled = [1] * 100000000000\n")),
    ("a text as long as the memory", "train bad.py", ["bad.py:1", "recipe", "numbers"],
     config_file("recipe = scale * 100000000000\n")),
    ("binary, not a config", "train bad.py", ["bad.py", "key = value"], config_file(bytes(range(256)))),
    ("a zero byte in a config", "train bad.py", ["bad.py", "key = value"], config_file("seed = 1\0")),
    ("json, not a config", "train bad.py", ["bad.py", "key = value"], config_file('{"seed": 1}')),
    ("two keys at once in a file", "train bad.py", ["bad.py:1", "key = value"],
     config_file("seed = n_layer = 3\n")),
    ("unknown key in a file", "train bad.py", ["bad.py:2", "sed", "did you mean 'seed'"],
     config_file("n_layer = 3\nsed = 1\n")),
    ("wrong type in a file", "train bad.py", ["bad.py:1", "seed", "'1'", "int"], config_file("seed = '1'\n")),
    ("an unset name in a file", "train bad.py", ["bad.py:1", "sead", "already set"],
     config_file("seed = sead + 1\n")),
    ("a division by zero in a file", "train bad.py", ["bad.py:1", "seed", "zero"],
     config_file("seed = 1 // 0\n")),
    ("a plugin named in a file", "train bad.py", ["bad.py:1", "--plugin=FILE"],
     config_file("plugin = ['x.py']\n")),
    ("scale after recipe", "train config/best.py config/small.py", ["small.py", "before the recipe"]),
    # names of folders
    ("a recipe that leads elsewhere", "train --recipe=../../x", ["recipe='../../x'", "plain name"]),
    ("a recipe that is empty", "train --recipe=", ["recipe=''", "plain name"]),
    ("a recipe that is hidden", "train --recipe=.x", ["recipe='.x'", "plain name"]),
    ("a scale that leads elsewhere", "train --scale=/tmp", ["scale='/tmp'", "plain name"]),
    ("a text that lies elsewhere", "train --dataset=../data", ["dataset='../data'", "plain name"]),
    ("a text without a name", "train --dataset=", ["dataset=''", "plain name"]),
    ("a recipe longer than a name may be", "train --recipe=" + "x" * 300, ["too long", "--out_dir"]),
    ("an output folder that cannot be made", "train --out_dir=/proc/nowhere/run",
     ["/proc/nowhere/run", "--out_dir"]),
    ("a file for an output folder", "train --out_dir=data/tiny/meta.json",
     ["data/tiny/meta.json", "--out_dir"]),
    ("a link to nowhere for an output folder", "train --out_dir=link", ["link", "--out_dir"],
     lambda m: os.symlink("nowhere", "link")),
    # what is too large
    ("a rank beyond any", "train --cheap_rank=1000000000000", ["cheap_rank", "too large", "1,000,000"]),
    ("a batch beyond any", "train --batch_size=4000000000", ["batch_size", "too large"]),
    ("a batch beyond memory", "train --seed=1 --batch_size=999999999", ["GiB", "--batch_size"]),
    ("a width beyond memory", "train --seed=1 --n_embd=999998", ["GiB", "smaller"]),
    ("a rank beyond memory", "train --seed=1 --n_embd=65536 --cheap_rank=999999", ["GiB", "smaller"]),
    ("a backbone beyond memory", "train --seed=1 --backbone_batch_size=999999999", ["GiB", "--batch_size"]),
    ("layers beyond any", "train --n_layer=1000000", ["n_layer", "too large", "10,000"]),
    ("threads beyond any", "train --threads=9223372036854775807", ["threads", "too large", "1,024"]),
    ("threads beyond 64 bits", "train --threads=9223372036854775808", ["threads", "64 bits"]),
    ("more threads than any machine has", "train --threads=5000", ["threads=5000", "too large"]),
    ("a rate of Muon beyond any", "train --muon_lr=1e300", ["muon_lr", "too large"]),
    ("a rate beyond any", "train --learning_rate=1e300", ["learning_rate", "too large"]),
    ("a loss weight beyond any", "train --lambda_rank=1e300", ["lambda_rank", "too large"]),
    # several processes
    ("a batch that the processes cannot share", "train --seed=1", ["batch_size=4", "3 processes", "multiple"],
     processes(WORLD_SIZE="3", RANK="0")),
    ("WORLD_SIZE without RANK", "train --seed=1", ["RANK", "WORLD_SIZE", "torchrun"],
     processes(WORLD_SIZE="2")),
    ("RANK without WORLD_SIZE", "train --seed=1", ["RANK", "WORLD_SIZE", "torchrun"], processes(RANK="0")),
    ("WORLD_SIZE in words", "train --seed=1", ["WORLD_SIZE=two", "torchrun"],
     processes(WORLD_SIZE="two", RANK="0")),
    ("no processes", "train --seed=1", ["WORLD_SIZE=0", "torchrun"], processes(WORLD_SIZE="0", RANK="0")),
    ("a process beyond the last", "train --seed=1", ["RANK=2", "torchrun"],
     processes(WORLD_SIZE="2", RANK="2")),
    ("processes that cannot meet", "train --seed=1", ["do not find each other", "torchrun"],
     lambda m: (m.setenv("WORLD_SIZE", "2"), m.setenv("RANK", "0"), m.delenv("MASTER_ADDR", raising=False))),
    # plugins
    ("a plugin that is not there", "train --plugin=nowhere.py", ["nowhere.py", "cannot be read"]),
    ("a plugin that is a folder", "train --plugin=out", ["out", "cannot be read"]),
    ("a plugin that is no Python", "train --plugin=bad.txt", ["bad.txt", ".py"], written("bad.txt", "x")),
    ("a plugin with a syntax error", "train --plugin=bad.py", ["bad.py", "SyntaxError"],
     config_file("def\n")),
    ("a plugin that fails", "train --plugin=bad.py", ["bad.py", "ZeroDivisionError"], config_file("1 / 0\n")),
    ("a plugin that ends the program", "train --plugin=bad.py", ["bad.py", "SystemExit"],
     config_file("import sys\nsys.exit(5)\n")),
    ("a plugin that registers what there is", "train --plugin=bad.py", ["bad.py", "'g1'", "another name"],
     config_file("from gates import GATES, Gate\n@GATES.register('g1')\nclass Mine(Gate):\n    pass\n")),
    ("a plugin with an unknown flag", "train --plugin=bad.py",
     ["bad.py", "'weigth'", "did you mean 'weight'"],
     config_file("from gates import LOSSES\n@LOSSES.register('mine', weigth=1)\n"
                 "def mine(step):\n    pass\n")),
    ("a plugin without a name", "train --plugin=", ["plugin", "''"]),
    ("a plugin without a value", "train --plugin", ["plugin"]),
    # data that is read
    ("no such data", "train --dataset=nope --seed=1", ["data/nope", "prepare.py"]),
    ("no train.bin", "train --seed=1", ["train.bin is missing", "--overwrite"], gone(DATA / "train.bin")),
    ("no test.bin though meta lists it", "train --seed=1", ["test.bin is missing", "--overwrite"],
     gone(DATA / "test.bin")),
    ("an empty bin", "train --seed=1", ["val.bin", "0 tokens", "--block_size"], bin_cut("val.bin", 0)),
    ("a bin cut at an odd byte", "train --seed=1", ["train.bin", "odd", "--overwrite"],
     bin_cut("train.bin", -1)),
    ("a bin cut at a token", "train --seed=1", ["train.bin", "meta.json", "--overwrite"],
     bin_cut("train.bin", -2)),
    ("a bin shorter than a block", "train --block_size=4096 --seed=1",
     ["val.bin", "block_size + 1 = 4097", "smaller"]),
    ("ids beyond the vocabulary", "train --seed=1", ["train.bin", "300", "257", "--overwrite"],
     of_another_vocabulary),
    ("a changed bin", "train --seed=1", ["val.bin", "meta.json", "--overwrite"],
     in_bytes(DATA / "val.bin", lambda b: b"a\0" + b[2:])),
    ("a folder for a bin", "train --seed=1", ["train.bin"], folder_at(DATA / "train.bin")),
    ("meta that is cut", "train --seed=1", ["meta.json", "--overwrite"], cut(META)),
    ("meta that is empty", "train --seed=1", ["meta.json", "--overwrite"], written(META)),
    ("meta that is no UTF-8", "train --seed=1", ["meta.json", "--overwrite"],
     in_bytes(META, lambda b: b"\xff" + b)),
    ("meta that is a list", "train --seed=1", ["meta.json", "--overwrite"], written(META, b"[]")),
    ("meta as deep as can be", "train --seed=1", ["meta.json", "--overwrite"], written(META, b"[" * 100_000)),
    ("meta that is a folder", "train --seed=1", ["meta.json"], folder_at(META)),
    ("meta without a tokenizer", "train --seed=1", ["meta.json", "tokenizer"], without(META, "tokenizer")),
    ("meta with an unknown tokenizer", "train --seed=1", ["klingon"],
     with_value(META, "tokenizer", "klingon")),
    ("meta with a vocabulary in words", "train --seed=1", ["meta.json", "many"],
     with_value(META, "vocab_size", "many")),
    ("meta with a vocabulary in quotes", "train --seed=1", ["meta.json", "257"],
     with_value(META, "vocab_size", "257")),
    ("meta with no vocabulary", "train --seed=1", ["meta.json", "vocab_size"],
     with_value(META, "vocab_size", 0)),
    ("meta without splits", "train --seed=1", ["meta.json", "--overwrite"], with_value(META, "splits", {})),
    ("meta with a list of splits", "train --seed=1", ["meta.json", "splits"], with_value(META, "splits", [])),
    ("meta with a split that is null", "train --seed=1", ["meta.json", "--overwrite"],
     with_value(META, "splits", "val", None)),
    ("meta with another count", "train --seed=1", ["val.bin", "meta.json", "--overwrite"],
     with_value(META, "splits", "val", "tokens", 5)),
    ("meta with another hash", "train --seed=1", ["test.bin", "meta.json", "--overwrite"],
     with_value(META, "splits", "test", "sha256", "0")),
    # data that is made
    ("a glob that matches nothing", "prepare --name=mine --tokenizer=bytes --source=nowhere/*.txt",
     ["nowhere/*.txt", "matches no file", "glob"]),
    ("files of two kinds", LOCAL, ["parquet", "txt", "one kind"],
     both(parquet(text=["a"]), source("a.txt", "a"))),
    ("files of no known kind", LOCAL, ["csv", "parquet"], source("a.csv", "text\na\n")),
    ("parquet without text", LOCAL, ["`text`", "content", "rename"], parquet(content=["a", "b"])),
    ("parquet with a number for text", LOCAL, ["`text`"], parquet(text=[1, 2])),
    ("a broken parquet", LOCAL, ["texts/"],
     both(parquet(text=make_documents(0)), cut("texts/a.parquet", 500))),
    ("an empty parquet", LOCAL, ["texts/"], source("a.parquet", b"")),
    ("jsonl without text", LOCAL, ["`text`", "content", "rename"], source("a.jsonl", '{"content": "a"}\n')),
    ("jsonl with null for text", LOCAL, ["`text`"], source("a.jsonl", LINES + '{"text": null}\n')),
    ("jsonl of lists", LOCAL, ["texts/"], source("a.jsonl", LINES + '["a"]\n')),
    ("broken jsonl", LOCAL, ["texts/"], source("a.jsonl", LINES + '{"text": "a\n')),
    ("jsonl in invalid UTF-8", LOCAL, ["texts/"],
     source("a.jsonl", LINES.encode() + b'{"text": "\xff\xfe"}\n')),
    ("txt in invalid UTF-8", LOCAL, ["texts/", "UTF-8"], source("a.txt", b"good \xff\xfe bad")),
    ("empty documents only", LOCAL, ["texts/*", "no document", "more"],
     source("a.jsonl", '{"text": ""}\n' * 100)),
    ("an empty file", LOCAL, ["texts/"], source("a.jsonl", "")),
    ("too few documents for a split", LOCAL, ["texts/*", "no document in", "more"],
     source("a.jsonl", '{"text": "one"}\n')),
    ("data that exists", "prepare --name=tiny --tokenizer=bytes --source=texts/*",
     ["data/tiny exists already", "--overwrite"], source("a.jsonl", LINES)),
    ("data in the place of a link", LOCAL + " --overwrite", ["data/mine", "link"],
     linked("data/mine", "tiny")),
    ("data without a name", "prepare --source=texts/*", ["texts/*", "--name=NAME"]),
    ("a path for a name", "prepare --name=../mine --source=texts/*", ["../mine", "plain folder name"]),
    ("a hidden name", "prepare --name=.mine --source=texts/*", [".mine", "plain folder name"]),
    ("an unknown tokenizer", "prepare --name=mine --source=texts/* --tokenizer=byte", ["'byte'", "'bytes'"]),
    ("a vocabulary that cannot be fetched", "prepare --name=mine --source=texts/*",
     ["gpt2", "TIKTOKEN_CACHE_DIR"],
     both(source("a.jsonl", LINES), no_gpt2)),
    ("a count in words", LOCAL + " --tokens=many", ["many", "200M"], source("a.jsonl", LINES)),
    ("a negative count", LOCAL + " --tokens=-5M", ["-5M", "200M"], source("a.jsonl", LINES)),
    ("a count of nothing", LOCAL + " --tokens=0", ["'0'", "200M"], source("a.jsonl", LINES)),
    ("a count that is no number", LOCAL + " --tokens=nan", ["'nan'", "200M"], source("a.jsonl", LINES)),
    ("a negative number of workers", LOCAL + " --workers=-1", ["workers", "-1"], source("a.jsonl", LINES)),
    ("unknown key of prepare.py", "prepare --tokenizr=bytes", ["tokenizr", "did you mean 'tokenizer'"]),
    ("a data folder that cannot be written", LOCAL, ["data/mine"], no_place_for_data),
    # checkpoints
    ("sample without a run", "sample out/tiny/nope", ["out/tiny/nope", "train it first"]),
    ("a file for a run", "sample {run}/ckpt.pt", ["{run}/ckpt.pt"]),
    ("eval_only without a run", "train --eval_only --seed=7", ["seed7", "train it first"]),
    ("a backbone folder without a checkpoint", "train --backbone=data --seed=1", ["data", "ckpt.pt"]),
    ("a cut checkpoint", "sample {run}", ["ckpt.pt", "truncated", "--overwrite"], cut(RUN / "ckpt.pt")),
    ("a cut checkpoint at a resume", "train", ["ckpt.pt", "truncated", "--overwrite"],
     unfinished(cut(RUN / "ckpt.pt"))),
    ("a cut checkpoint of a finished run", "train", ["ckpt.pt", "truncated", "--overwrite"],
     cut(RUN / "ckpt.pt")),
    ("a cut checkpoint of the backbone", "train --seed=1", ["ckpt.pt", "truncated"],
     cut(BACKBONE / "ckpt.pt")),
    ("an empty checkpoint", "sample {run}", ["ckpt.pt", "--overwrite"], written(RUN / "ckpt.pt", b"")),
    ("text for a checkpoint", "sample {run}", ["ckpt.pt", "--overwrite"], written(RUN / "ckpt.pt", b"hello")),
    ("a folder for a checkpoint", "sample {run}", ["ckpt.pt", "cannot be read"], folder_at(RUN / "ckpt.pt")),
    ("a folder for a checkpoint at a resume", "train", ["ckpt.pt"], unfinished(folder_at(RUN / "ckpt.pt"))),
    ("a tensor for a checkpoint", "sample {run}", ["ckpt.pt", "--overwrite"], a_tensor_for_a_checkpoint),
    ("a checkpoint that lacks a field", "sample {run}", ["ckpt.pt", "budgets"],
     checkpoint_without("budgets")),
    ("a checkpoint with a field of another type", "sample {run}", ["ckpt.pt", "step", "'4'"],
     checkpoint_with("step", "4")),
    ("a checkpoint with half a config", "sample {run}", ["ckpt.pt", "dataset"],
     checkpoint_without("config", "dataset")),
    ("a checkpoint that lacks weights", "sample {run}", ["h.1.cheap.c_fc.bias", "missing"],
     checkpoint_without("model", "h.1.cheap.c_fc.bias")),
    ("a checkpoint that was changed", "sample {run}", ["ckpt.pt", "digest"],
     checkpoint_with("budgets", [0.25, 0.75], keep_digest=True)),
    ("a checkpoint that was changed, at a resume", "train", ["ckpt.pt", "digest"],
     unfinished(checkpoint_with("seconds", 7.0, keep_digest=True))),
    ("an unreadable checkpoint", "sample {run}", ["ckpt.pt", "Permission denied", "who may read"],
     unreadable),
    ("an unreadable checkpoint at a resume", "train", ["ckpt.pt", "Permission denied"],
     unfinished(unreadable)),
    ("an unreadable checkpoint of the backbone", "train --seed=1", ["ckpt.pt", "Permission denied"],
     unreadable),
    ("a pickle with code", "sample {run}", ["ckpt.pt", "--overwrite"], pickle_with_code(RUN / "ckpt.pt")),
    ("a bare pickle with code", "sample {run}", ["ckpt.pt", "--overwrite"], bare_pickle_with_code),
    ("a pickle with code at a resume", "train", ["ckpt.pt", "--overwrite"],
     unfinished(pickle_with_code(RUN / "ckpt.pt"))),
    ("a pickle with code for a backbone", "train --seed=1", ["ckpt.pt"],
     pickle_with_code(BACKBONE / "ckpt.pt")),
    ("a checkpoint of another gate", "train", ["{run}", "recipe", "'g1_full_aux'"],
     unfinished(copied(G1 / "ckpt.pt", RUN / "ckpt.pt"))),
    ("a checkpoint of another gate, to sample from", "sample {run}", ["{run}", "recipe", "put its own back"],
     copied(G1 / "ckpt.pt", RUN / "ckpt.pt")),
    ("a checkpoint of another seed", "train", ["{run}/ckpt.pt", "seed (there 0, here 1)", "--overwrite"],
     another_seed(copied(SEED_1 / "ckpt.pt", RUN / "ckpt.pt"))),
    ("a checkpoint of another seed, no config", "train", ["{run}/ckpt.pt", "seed (there 1, here 0)"],
     another_seed(both(copied(SEED_1 / "ckpt.pt", RUN / "ckpt.pt"), gone(RUN / "config.json")))),
    ("a folder of another seed", "train", ["{run}", "seed (there 1, here 0)"],
     another_seed(both(copied(SEED_1 / "ckpt.pt", RUN / "ckpt.pt"),
                       copied(SEED_1 / "config.json", RUN / "config.json")))),
    ("a checkpoint of the backbone", "train", ["{run}", "mode"],
     unfinished(copied(BACKBONE / "ckpt.pt", RUN / "ckpt.pt"))),
    ("no config.json and another rate", "train --gate_lr=0.5", ["{run}/ckpt.pt", "gate_lr", "--recipe"],
     unfinished(gone(RUN / "config.json"))),
    ("no config.json and another rate, finished", "train --gate_lr=0.5", ["{run}", "config.json"],
     gone(RUN / "config.json")),
    ("a checkpoint beyond the last step", "train", ["step 7 of 6"], unfinished(checkpoint_with("step", 7))),
    ("a checkpoint before the first step", "train", ["step -1 of 6"],
     unfinished(checkpoint_with("step", -1))),
    ("no optimizer", "train", ["optimizer state", "--overwrite"],
     unfinished(checkpoint_with("optimizers", []))),
    ("an optimizer without state", "train", ["optimizer state", "--overwrite"],
     unfinished(checkpoint_with("optimizers", 0, "state", {}))),
    ("an optimizer of other groups", "train", ["optimizer state"],
     unfinished(in_checkpoint(RUN / "ckpt.pt", lambda c: c["optimizers"][0]["param_groups"].pop()))),
    ("an optimizer that is none", "train", ["optimizer state"],
     unfinished(checkpoint_with("optimizers", [[1]]))),
    ("an optimizer with another", "train", ["optimizer state"],
     unfinished(in_checkpoint(RUN / "ckpt.pt", lambda c: c["optimizers"].append(c["optimizers"][0])))),
    ("no checkpoint beside a summary", "train", ["{run}", "no ckpt.pt", "--overwrite"],
     gone(RUN / "ckpt.pt")),
    ("a shortened log", "train", ["log.jsonl", "100 bytes", "put it back", "--overwrite"],
     unfinished(cut(RUN / "log.jsonl", 100))),
    ("a deleted log", "train", ["log.jsonl", "0 bytes", "--overwrite"], unfinished(gone(RUN / "log.jsonl"))),
    ("a log that is a folder", "train", ["log.jsonl", "directory"], unfinished(folder_at(RUN / "log.jsonl"))),
    ("a log that is a folder, overwritten", "train --overwrite", ["log.jsonl", "folder"],
     folder_at(RUN / "log.jsonl")),
    ("a changed log of a finished run", "train", ["log.jsonl", "changed", "--overwrite"],
     in_bytes(RUN / "log.jsonl", lambda b: b.replace(b"0", b"1", 1))),
    ("a log that was changed", "train", ["log.jsonl", "changed", "--overwrite"],
     unfinished(in_bytes(RUN / "log.jsonl", lambda b: b.replace(b"0", b"1", 1)))),
    ("the log of another run", "train", ["log.jsonl", "--overwrite"],
     another_seed(copied(SEED_1 / "log.jsonl", RUN / "log.jsonl"))),
    # backbones
    ("a backbone of another shape", "train --backbone=out/wide --seed=1",
     ["out/wide", "n_embd=32", "--n_embd=32"],
     other_width),
    ("a backbone of fewer layers", "train --backbone={backbone} --n_layer=4 --seed=1",
     ["{backbone}", "--n_layer=3"]),
    ("a backbone with other heads", "train --backbone={backbone} --n_head=4 --seed=1",
     ["{backbone}", "--n_head=2"]),
    ("a backbone with another activation", "train --backbone={backbone} --activation=gelu_new --seed=1",
     ["{backbone}", "--activation=gelu"]),
    ("a backbone with another context", "train --backbone={backbone} --block_size=8 --seed=1",
     ["{backbone}", "--block_size=16"]),
    ("a run of gates for a backbone", "train --backbone={run} --seed=1", ["{run}", "missing"]),
    ("a backbone that is no recipe", "train --backbone=backbon --seed=1",
     ["backbon", "did you mean 'backbone'"]),
    ("a gate in the folder of its backbone", "train --out_dir={backbone}",
     ["{backbone}", "mode", "--out_dir"]),
    ("a gate over its backbone", "train --out_dir={backbone} --overwrite",
     ["{backbone}", "--overwrite does not"]),
    ("a gate over its backbone, named by its folder",
     "train --backbone={backbone} --out_dir={backbone} --overwrite",
     ["{backbone}", "--overwrite does not"]),
    ("an arm over another", "train --out_dir={g1} --overwrite",
     ["{g1}", "'g1_full_aux'", "--overwrite does not"]),
    ("a checkpoint of another run in the backbone", "train --seed=1", ["{backbone}"],
     copied(RUN / "ckpt.pt", BACKBONE / "ckpt.pt")),
    ("a backbone that was changed", "train --seed=1", ["{backbone}/ckpt.pt", "digest"],
     checkpoint_with("seconds", 7.0, path=BACKBONE / "ckpt.pt", keep_digest=True)),
    # records
    ("a cut config.json", "train", ["config.json", "--overwrite"], cut(RUN / "config.json")),
    ("a config.json that is a list", "train", ["config.json", "[1]", "--overwrite"],
     written(RUN / "config.json", b"[1]")),
    ("a config.json that is null", "train", ["config.json", "--overwrite"],
     written(RUN / "config.json", b"null")),
    ("a config.json that is a folder", "train", ["config.json"], folder_at(RUN / "config.json")),
    ("a config.json without a field", "train", ["config.json", "identity"],
     without(RUN / "config.json", "identity")),
    ("a config.json with a text for a number", "sample {run}", ["config.json", "seed", "'0'"],
     with_value(RUN / "config.json", "seed", "0")),
    ("a config.json with another value", "sample {run}", ["ckpt.pt", "gate_lr", "put its own back"],
     with_value(RUN / "config.json", "gate_lr", 0.5)),
    ("another config.json at an evaluation", "train --eval_only", ["ckpt.pt", "gate_lr"],
     with_value(RUN / "config.json", "gate_lr", 0.5)),
    ("a config.json of the backbone that is a list", "train --seed=1", ["config.json", "[1]"],
     written(BACKBONE / "config.json", b"[1]")),
    ("a cut summary.json", "train", ["summary.json", "--overwrite"], cut(RUN / "summary.json")),
    ("a summary.json that is a list", "train", ["summary.json", "[1]"],
     written(RUN / "summary.json", b"[1]")),
    ("a summary.json without a field", "train", ["summary.json", "val_loss"],
     without(RUN / "summary.json", "val_loss")),
    ("a summary.json with another number", "train", ["summary.json", "not as it was written"],
     with_value(RUN / "summary.json", "steps", 7)),
    ("a summary.json of another run", "train", ["summary.json", "another run"],
     copied(G1 / "summary.json", RUN / "summary.json")),
    # GPT-2
    ("a Hugging Face folder without a config", "train --backbone=hf:data --seed=1", ["data/config.json"]),
    ("a Hugging Face config that is a list", "train --backbone=hf:gpt2 --seed=1",
     ["gpt2/config.json", "no object"],
     written("gpt2/config.json", "[1]")),
    ("a Hugging Face folder without weights", "train --backbone=hf:gpt2 --activation=gelu_new --seed=1",
     ["model.safetensors", "missing"], both(gpt2_folder(b""), gone("gpt2/model.safetensors"))),
    ("Hugging Face weights that are cut", "train --backbone=hf:gpt2 --activation=gelu_new --seed=1",
     ["model.safetensors"], gpt2_folder(b"\0" * 20)),
    ("Hugging Face weights without our names", "train --backbone=hf:gpt2 --activation=gelu_new --seed=1",
     ["wte.weight"], gpt2_folder("none of the names")),
    ("a Hugging Face model of another shape", "train --backbone=hf:gpt2 --seed=1", ["gpt2", "n_layer", "12"],
     gpt2_folder(b"", n_layer=12)),
    ("a Hugging Face model with a shape in words", "train --backbone=hf:gpt2 --seed=1",
     ["gpt2", "n_head", "'two'"],
     gpt2_folder(b"", n_head="two")),
    ("a Hugging Face model of another nonlinearity", "train --backbone=hf:gpt2 --seed=1",
     ["gelu_new", "--activation=gelu_new"], gpt2_folder(b"")),
    # routing
    ("an evaluation of a run as what it is not", "train --eval_only --gate=linear", ["gate", "linear"]),
    ("portions too small", "train --share_step=1e-7 --seed=1", ["share_step", "1e-07"]),
    ("a budget above 1", "train --budget=1.5", ["budget", "1.5", "[0, 1]"]),
    ("a budget below 0", "train --budget=-0.1", ["budget", "-0.1", "[0, 1]"]),
    ("a budget that is no number", "train --budget=nan", ["budget", "nan", "float"]),
    ("a budget in percent", "train --budget=50%", ["budget", "50%", "float"]),
    ("no controlled layer", "train --controlled=[]", ["controlled=[]", "at least one", "0..2"]),
    ("a controlled layer that does not exist", "train --controlled=[1,3]", ["[1, 3]", "0..2"]),
    ("a negative controlled layer", "train --controlled=[-1]", ["[-1]", "0..2"]),
    ("a controlled layer twice", "train --controlled=[1,1]", ["[1, 1]", "0..2"]),
    ("controlled layers out of order", "train --controlled=[2,1]", ["[2, 1]", "ascending"]),
    ("a controlled layer in quotes", "train --controlled=\"['1']\"", ["['1']", "0..2"]),
    ("controlled layers of several types", "train --controlled=\"[1,'2']\"", ["[1, '2']", "0..2"]),
    ("a list of lists of layers", "train --controlled=[[1]]", ["[[1]]", "0..2"]),
    ("an unknown gate", "train --gate=g4", ["gate", "'g4'", "did you mean"]),
    ("an unknown estimator", "train --estimator=step", ["estimator", "'step'", "did you mean"]),
    ("an unknown mode", "train --mode=topp", ["mode", "'topp'", "did you mean 'topk'"]),
    ("an unknown execution", "train --execution=gatherd", ["'gatherd'", "did you mean 'gathered'"]),
    ("an unknown activation", "train --activation=relu", ["activation", "'relu'"]),
    ("an unknown target of labels", "train --label_target=nxt", ["'nxt'", "did you mean 'next'"]),
    ("labels alone, and none", "train --estimator=hard --lambda_util=0 --lambda_rank=0",
     ["hard", "--lambda_util"]),
    ("no loss for the cheap FFNs", "train --lambda_lm=0", ["--lambda_lm", "--lambda_distill"]),
    ("labels that slices cannot share", "train --seed=1 --label_share=0.3 --gradient_accumulation_steps=2",
     ["label_share=0.3", "4 rows"]),
    ("a picture of no routing", "sample {run} --mode=full --view=x.png", ["--view", "full"]),
    ("a picture of a dense model", "sample {backbone} --view=x.html", ["--view", "full"]),
    ("an unknown oracle", "train --oracle=onpolicy", ["oracle", "'onpolicy'", "did you mean 'on_policy'"]),
    ("a share of labels above 1", "train --label_share=2", ["label_share", "2", "[0, 1]"]),
    # prompts and sampling
    ("no folder", "sample --prompt=a", ["folder", "sample.py out/"]),
    ("two folders", "sample {run} {g1}", ["{g1}"]),
    ("an empty prompt", "sample {run} --prompt=", ["--prompt=''", "at least one"]),
    ("a prompt longer than the context", "sample {run} --prompt='seventeen letters'",
     ["17 tokens", "16", "shorten"]),
    ("a prompt that is no text", "sample {run} --prompt=a\udcff", ["prompt", "udcff"]),
    ("sampling under topk", "sample {run} --mode=topk", ["'topk'", "threshold", "future"]),
    ("sampling under an unknown mode", "sample {run} --mode=fulll", ["'fulll'", "full"]),
    ("sampling at a budget above 1", "sample {run} --budget=2", ["budget", "2", "[0, 1]"]),
    ("sampling at a negative budget", "sample {run} --budget=-0.5", ["budget", "-0.5", "[0, 1]"]),
    ("a budget for a backbone", "sample {backbone} --budget=0.5", ["budget", "0.5"]),
    ("a negative temperature", "sample {run} --temperature=-1", ["temperature", "0 or more"]),
    ("a temperature too small to divide by", "sample {run} --temperature=1e-300",
     ["1e-300", "0 takes the likeliest"]),
    ("a temperature that is no number", "sample {run} --temperature=nan", ["temperature", "nan"]),
    ("an infinite temperature", "sample {run} --temperature=1e999", ["temperature", "finite"]),
    ("top_k of 0", "sample {run} --top_k=0", ["top_k", "1 or more"]),
    ("negative new tokens", "sample {run} --max_new_tokens=-1", ["max_new_tokens", "0 or more"]),
    ("a sampling seed beyond 64 bits", "sample {run} --seed=99999999999999999999", ["seed", "64 bits"]),
    ("a view of an unknown kind", "sample {run} --view=a.pdf", ["a.pdf", ".html or .png"]),
    ("a view that exists", "sample {run} --view=a.html", ["a.html exists", "--overwrite"],
     written("a.html", "mine")),
    ("a view in no folder", "sample {run} --view=nowhere/a.html --max_new_tokens=1",
     ["nowhere/a.html", "does not exist"]),
    ("a folder for a view", "sample {run} --view=a.html --max_new_tokens=1 --overwrite", ["a.html"],
     folder_at("a.html")),
    ("unknown key of sample.py", "sample {run} --promt=a", ["promt", "did you mean 'prompt'"]),
    # studies
    ("an arm that does not exist", "study --arms=g1_ful_aux", ["g1_ful_aux", "did you mean 'g1_full_aux'"]),
    ("an arm twice", "study --arms=random,random", ["random", "twice"]),
    ("no arm", "study --arms=", ["arms"]),
    ("no seeds", "study --arms=random --seeds=", ["seeds=''", "--seeds=0,1,2"]),
    ("a seed twice", "study --arms=random --seeds=1,1", ["1,1", "twice"]),
    ("a seed in words", "study --arms=random --seeds=one", ["'one'", "--seeds=0,1,2"]),
    ("a negative seed in a study", "study --arms=random --seeds=-1", ["'-1'", "--seeds=0,1,2"]),
    ("a seed of a study beyond 64 bits", "study --arms=random --seeds=99999999999999999999", ["seed"]),
    ("negative jobs", "study --arms=random --jobs=-1", ["jobs", "-1"]),
    ("a study that leads elsewhere", "study --arms=random --study=../x", ["study='../x'", "plain name"]),
    ("a study without a name", "study --arms=random --study=", ["study=''", "plain name"]),
    ("a recipe for every arm", "study config/best.py --arms=random", ["best.py", "--arms"]),
    ("a seed for every arm", "study --arms=random --seed=1", ["--seed=1", "--seeds"]),
    ("unknown key of a study", "study --arm=random", ["'arm'", "did you mean"]),
    ("a report of nothing", "study --report_only --report=out/nothing", ["out/nothing", "--report"]),
    ("a bad value for every arm", "study --arms=random --budget=2", ["budget", "2", "[0, 1]"]),
    ("a study of no such data", "study --arms=random --dataset=nope", ["data/nope", "prepare.py"]),
    ("a study with no such backbone", "study --arms=random --seeds=0 --backbone=backbon",
     ["did you mean 'backbone'"]),
    # audits
    ("an audit of nothing", "audit --rows=2", ["name the folder"]),
    ("an audit of a dense model", "audit {backbone}", ["no gates", "full"]),
    ("an audit of a checkpoint that was not kept", "audit --checkpoint=ckpt-3.pt {run}",
     ["ckpt-3.pt", "not exist"]),
    ("an audit of no rows", "audit --rows=0 {run}", ["rows=0", "1 or more"]),
    ("an audit of negative positions", "audit --positions=-3 {run}", ["positions=-3", "2 or more"]),
    # the benchmark
    ("a row that the benchmark lacks", "bench --rows=memry", ["memry", "known:"]),
    ("a benchmark of no repeats", "bench --repeat=0", ["repeat=0", "1 or more"]),
    ("an arm that the benchmark lacks", "bench --arm=bst", ["bst", "did you mean 'best'"]),
    ("a recipe for the benchmark", "bench config/best.py", ["recipe", "arm"]),
    ("a baseline that is no nanoGPT", "bench --baseline=nowhere", ["nowhere", "nanoGPT"]),
    ("unknown key of the benchmark", "bench --row=memory", ["'row'", "unknown key"]),
    # devices
    ("cuda where there is none", "train --device=cuda", ["cuda", "--device=cpu"], no_cuda),
    ("cuda for eval_only", "train --device=cuda --eval_only", ["cuda", "--device=cpu"], no_cuda),
    ("cuda for sampling", "sample {run} --device=cuda", ["cuda", "--device=cpu"], no_cuda),
    ("cuda for a study", "study --arms=random --device=cuda", ["cuda", "--device=cpu"], no_cuda),
    ("an unknown device", "train --device=cup", ["'cup'", "did you mean 'cpu'"]),
    ("an unknown device for sampling", "sample {run} --device=tpu", ["'tpu'", "cpu"]),
    ("an unknown dtype", "train --dtype=float8", ["'float8'", "did you mean 'float32'"]),
]
CASES = [(*case, nothing)[:4] for case in CASES]


def filled(text):
    return text.replace("{run}", str(RUN)).replace("{backbone}", str(BACKBONE)).replace("{g1}", str(G1))


def command(text):
    """A case's command -> the script and its words."""
    script, *words = shlex.split(filled(text))
    return script, tiny(*words) if script in ("train", "study") else words


def check_line(err, needles):
    assert err.count("\n") == 1 and err.startswith("error: "), err
    missing = [n for n in map(filled, needles) if n.casefold() not in err.casefold()]
    assert not missing, f"{missing} not in {err!r}"


def too_long(*args):
    raise TimeoutError("a bad input was not refused in time")


@pytest.fixture
def in_time():
    """A bad input that is taken may train for ever."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)


def shown(warning):
    """Would Python print this warning on stderr by default?"""
    quiet = DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning
    return not issubclass(warning.category, quiet)


@pytest.mark.parametrize("text, needles, prepared", [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_bad_input_is_refused_in_one_line_and_changes_nothing(text, needles, prepared, done, monkeypatch,
                                                              capfd, recwarn, in_time):
    prepared(monkeypatch)
    script, words = command(text)
    before = snapshot()
    capfd.readouterr(), recwarn.clear()
    with pytest.raises(SystemExit) as stop:
        exit_on_error(lambda: go(script, *words))
    assert stop.value.code == 2
    check_line(capfd.readouterr().err, needles)
    assert not [str(w.message) for w in recwarn if shown(w)]  # those would be lines too
    assert snapshot() == before


def test_there_are_at_least_200_different_cases():
    assert len({case[0] for case in CASES}) == len(CASES) >= 200
    scripts = {case[1].split()[0] for case in CASES}
    assert scripts == {"train", "sample", "prepare", "bench", "study", "audit"}


def test_a_pickle_with_code_would_have_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, "ckpt.pt")
    torch.load("ckpt.pt", weights_only=False)
    assert Path("executed").is_dir()


# -----------------------------------------------------------------------------
# as a user meets it: processes

# Each is a process of its own, forked from one that has imported torch: importing takes longer than the rest.
CHILD = """
import importlib, io, json, os, sys
from configurator import exit_on_error
import torch, train, sample
torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports a thousand modules at its first use

for case in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        os.chdir(case["folder"])
        for descriptor, path in ((1, case["stdout"]), (2, case["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
        if case["closed"]:
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, 1)
        raw = open(1, "wb", closefd=False)
        sys.stdout = io.TextIOWrapper(raw, encoding=case["encoding"], errors="strict")
        sys.argv = [case["script"] + ".py", *case["words"]]
        exit_on_error(importlib.import_module(case["script"]).main)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(case["folder"] + "/code", "w") as f:
        f.write(str(code))
"""
NAMED = {case[0]: case for case in CASES}
BAD = ["unknown key", "a bare pickle with code", "a prompt that is no text", "a batch beyond memory",
       "a deleted log"]
ODD = {  # name: the script, its words, what is odd
    "stdout closed": ("train", [], {"closed": True}),
    "stdout closed, an error": ("train", ["--gate_lr=7"], {"closed": True}),
    "stdout closed under sample": ("sample", [str(RUN), "--prompt=the"], {"closed": True}),
    "stdout full": ("train", [], {"stdout": "/dev/full"}),
    "stdout full under sample": ("sample", [str(RUN), "--prompt=the"], {"stdout": "/dev/full"}),
    "ASCII": ("train", ["--seed=1", "--max_iters=1"], {"encoding": "ascii"}),
    "ASCII under sample": ("sample", [str(RUN), "--prompt=naïve 木"], {"encoding": "ascii"}),
}


@pytest.fixture(scope="module")
def ended(templates, tmp_path_factory):
    """{name: (exit code, stdout, stderr, folder, its snapshot before)} of each of BAD and ODD."""
    cases, before = {}, {}
    plain = {"closed": False, "stdout": "", "encoding": "utf-8"}
    for name in [*BAD, *ODD]:
        folder = tmp_path_factory.mktemp("ended") / "place"
        shutil.copytree(templates / "done", folder)
        with pytest.MonkeyPatch.context() as m:
            m.chdir(folder)
            if name in BAD:
                NAMED[name][3](m)
                (script, words), odd = command(NAMED[name][1]), {}
            else:
                script, words, odd = ODD[name]
                words = tiny(*words) if script == "train" else words
            before[name] = snapshot()
        streams = {"stdout": f"{folder}/../out", "stderr": f"{folder}/../err"}
        cases[name] = {**plain, **streams, **odd, "folder": str(folder), "script": script, "words": words}
    code, out, err = finish(start("-c", CHILD, json.dumps(list(cases.values()))), timeout=600)
    assert code == 0, out + err
    results = {}
    for name, case in cases.items():
        folder = Path(case["folder"])
        code = int((folder / "code").read_text())
        (folder / "code").unlink()
        out, err = (folder.parent / stream for stream in ("out", "err"))
        shown = out.read_text(errors="replace") if out.exists() else ""
        results[name] = code, shown, err.read_text(), folder, before[name]
    return results


@pytest.mark.parametrize("name", BAD)
def test_bad_input_in_a_process_of_its_own(name, ended, monkeypatch):
    code, _, err, folder, before = ended[name]
    monkeypatch.chdir(folder)
    assert code == 2
    check_line(err, NAMED[name][2])
    assert snapshot() == before


@pytest.mark.parametrize("name", ["stdout closed", "stdout closed under sample"])
def test_a_closed_pipe_ends_a_program_quietly(name, ended):
    code, _, err, _, _ = ended[name]
    assert code == 141 and err == ""


def test_a_closed_pipe_hides_no_error(ended):
    code, _, err, _, _ = ended["stdout closed, an error"]
    assert code == 2
    check_line(err, ["gate_lr"])


@pytest.mark.parametrize("name", ["stdout full", "stdout full under sample"])
def test_a_full_stdout_is_one_line(name, ended):
    code, _, err, _, _ = ended[name]
    assert code == 2
    check_line(err, ["No space left on device", "stdout"])


@pytest.mark.parametrize("name, text", [("ASCII", "went full"), ("ASCII under sample", "na??ve")])
def test_a_terminal_that_knows_ascii_alone_shows_question_marks(name, text, ended):
    code, out, err, _, _ = ended[name]
    assert (code, err) == (0, "") and text in out


@pytest.mark.parametrize("script", ["train", "sample", "prepare", "bench", "study"])
def test_an_unknown_key_from_a_shell(script, tmp_path):
    words = ["--zzz=1"] if script != "sample" else ["out", "--zzz=1"]
    code, out, err = finish(start(*script_words(script), *words, cwd=tmp_path))
    assert (code, out) == (2, "")
    check_line(err, ["zzz", "known:"])
    assert snapshot(tmp_path) == {}


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED_IMPORT)
    path = os.pathsep.join([str(tmp_path), str(HERE)])
    code, _, err = finish(start(HERE / "train.py", cwd=tmp_path, env={"PYTHONPATH": path}))
    assert err == "interrupted\n" and code != 0


INTERRUPTED_IMPORT = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


def test_ctrl_c_while_training_is_one_line_and_the_run_goes_on(place):
    child = start(HERE / "train.py", *tiny("--max_iters=100000"))
    for _ in range(600):
        if Path(RUN, "ckpt.pt").exists():
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    code, _, err = finish(child)
    assert (code, err) == (130, "interrupted\n")
    assert checkpoint_of(RUN)["step"] > 0


# -----------------------------------------------------------------------------
# what is odd and fine

def test_a_config_file_with_a_byte_order_mark_is_read(done):
    Path("mark.py").write_bytes(b"\xef\xbb\xbfseed = 0\n")
    assert "finished already" in go("train", "mark.py", *tiny())


def test_a_config_file_is_found_beside_the_program(done):
    assert not Path("config").exists()
    assert "finished already" in go("train", "config/g3_full_aux.py", *tiny())
    Path("config").mkdir()
    Path("config/g3_full_aux.py").write_text("seed = 5\n")  # the one here comes first
    go("train", "config/g3_full_aux.py", *tiny("--max_iters=1"))
    assert summary_of("out/tiny/g3_full_aux/seed5")["steps"] == 1


@pytest.mark.parametrize("file", ["ckpt.pt", "config.json", "summary.json"])
def test_the_remedy_that_a_broken_run_names_helps(file, done):
    cut(RUN / file)(None)
    with pytest.raises(ConfigError, match=f"{file}.*--overwrite"):
        go("train", *tiny())
    go("train", *tiny("--overwrite"))
    assert summary_of(RUN)["steps"] == 6 and "finished already" in go("train", *tiny())


# -----------------------------------------------------------------------------
# fuzz

INNER = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


def containers(inner):
    return (st.lists(inner, max_size=3) | st.tuples(inner, inner)
            | st.dictionaries(st.integers(), inner, max_size=2))


LITERALS = st.recursive(INNER, containers)
NASTY = st.sampled_from(["{[]:1}", "{{}}", "1" + "0" * 400, "9" * 5000, "1e999", "[" * 300, "-" * 3000 + "1",
                         "'", "\\", "(", "1j", "b''", "[[1]]", "..."])
KEYS = st.sampled_from(sorted(DEFAULTS)) | st.text(max_size=8)
VALUES = st.text(max_size=12) | LITERALS.map(repr) | NASTY


def resolve(words):
    """The config of these words, or None when they were refused in one line."""
    try:
        config = validate(configure(DEFAULTS, words))
    except ConfigError as error:
        assert str(error).strip()
        return None
    assert config.keys() == DEFAULTS.keys()
    assert all(type(v) is type(DEFAULTS[k]) for k, v in config.items())
    return config


@given(st.lists(st.tuples(KEYS, VALUES), max_size=4))
@example([("seed", "{[]:1}")])
@example([("learning_rate", "1" + "0" * 400)])
@example([("controlled", "[[1]]")])
@example([("controlled", "[1, 'a']")])
def test_any_words_give_a_config_or_one_error(pairs):
    resolve([f"--{key}={value}" for key, value in pairs])


@given(st.sampled_from(sorted(DEFAULTS)), LITERALS)
def test_a_value_that_is_taken_is_the_value_that_was_given(key, value):
    is_text = isinstance(DEFAULTS[key], str) and isinstance(value, str)
    config = resolve([f"--{key}={value if is_text else repr(value)}"])
    if config is not None and type(DEFAULTS[key]) is not str:
        assert config[key] == (list(value) if isinstance(value, tuple) else value) or config[key] == [value]


def as_line(key, separator, value):
    return f"{key}{separator}{value}\n".encode("utf-8", "replace")


LINE = st.builds(as_line, KEYS, st.sampled_from([" = ", "=", " += ", ": "]), VALUES)


@given(st.binary(max_size=40) | st.lists(LINE | st.binary(max_size=6), max_size=4).map(b"".join))
@example(b"learning_rate = 1" + b"0" * 400)
@example(b"controlled = [[1]]")
@example(b"seed = " + b"-" * 3000 + b"1")
@example(b"seed = " + b"(" * 300)
@example(b"recipe = 10 ** 5000")
@example(b"controlled = (1,) * 10000000000")
def test_any_bytes_as_a_config_file_give_a_config_or_one_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.py"
    path.write_bytes(content)
    resolve([str(path)])
