"""Bad input: exit code 2, one line on stderr that names the value and a remedy, no traceback, nothing changed on disk."""
import json
import os
import pickle
import shlex
import shutil
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import prepare
import train
from configurator import ConfigError, configure, exit_on_error
from conftest import HERE, finish, go, make_documents, recipe, snapshot, start, tiny

RUN, BACKBONE, DATA = Path("out/tiny/g3_full_aux/seed0"), Path("out/tiny/backbone/seed0"), Path("data/tiny")


# -----------------------------------------------------------------------------
# what goes wrong: each prepares the working directory, which has data/tiny, a backbone and finished runs of g1 and g3

def nothing(m):
    pass


def config_file(text):
    """Write bad.py."""
    return lambda m: Path("bad.py").write_bytes(text if isinstance(text, bytes) else text.encode())


def source(name, content):
    """Write a file under texts/."""
    def write(m):
        Path("texts").mkdir()
        Path("texts", name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return write


def parquet(**columns):
    def write(m):
        Path("texts").mkdir()
        datasets.Dataset.from_dict(columns).to_parquet("texts/a.parquet")
    return write


def broken_parquet(m):
    parquet(text=make_documents(0))(m)
    os.truncate("texts/a.parquet", 500)


def in_bin(name, change):
    """Change the bytes of data/tiny/<name>."""
    return lambda m: (DATA / name).write_bytes(change((DATA / name).read_bytes()))


def in_meta(change):
    """Change the dict of data/tiny/meta.json."""
    def write(m):
        meta = json.loads((DATA / "meta.json").read_text())
        change(meta)
        (DATA / "meta.json").write_text(json.dumps(meta))
    return write


def of_another_vocabulary(m):
    ids = np.fromfile(DATA / "train.bin", dtype=np.uint16)
    ids[7] = 300
    ids.tofile(DATA / "train.bin")


def unfinished(change=nothing):
    """A g3 run that has a checkpoint but no summary, so that the same command resumes it."""
    def write(m):
        (RUN / "summary.json").unlink()
        change(m)
    return write


def replaced(path, content):
    """Another file in the place of `path`: bytes, the path of a file to copy, or a function of the path."""
    def write(m):
        if callable(content):
            content(path)
        elif isinstance(content, bytes):
            Path(path).write_bytes(content)
        else:
            shutil.copy(content, path)
    return write


def half(path):
    os.truncate(path, os.path.getsize(path) // 2)


def resaved(change):
    """A checkpoint with a change to its dict."""
    def write(path):
        ckpt = torch.load(path, weights_only=True)
        change(ckpt)
        torch.save(ckpt, path)
    return write


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def pickle_with_code(path):
    ckpt = torch.load(path, weights_only=True)
    torch.save({**ckpt, "model": Code()}, path)


def bare_pickle_with_code(path):
    with open(path, "wb") as f:
        pickle.dump({"model": Code(), "config": {}, "step": 1}, f)


def other_width(m):
    go("train", *tiny(recipe("backbone"), "--n_embd=32", "--max_iters=1", "--out_dir=out/wide"))


def gpt2_folder(weights, **changes):
    """A Hugging Face folder gpt2/ of a GPT-2 of our shape."""
    def write(m):
        Path("gpt2").mkdir()
        config = {"model_type": "gpt2", "n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 257}
        Path("gpt2/config.json").write_text(json.dumps({**config, **changes}))
        if weights == "none of the names":
            from safetensors.torch import save_file
            save_file({"x": torch.zeros(1)}, "gpt2/model.safetensors")
        else:
            Path("gpt2/model.safetensors").write_bytes(weights)
    return write


def no_cuda(m):
    m.setattr(torch.cuda, "is_available", lambda: False)


def three_processes(m):
    m.setenv("WORLD_SIZE", "3")
    m.setattr(torch.distributed, "is_initialized", lambda: True)


def raising(error):
    def fail(*args, **options):
        raise error
    return fail


def offline(m):
    m.setattr(datasets, "load_dataset", raising(ConnectionError("Couldn't reach the Hub")))


def no_gpt2(m):
    m.setattr(prepare.tiktoken, "get_encoding", raising(OSError("offline")))


def no_place_for_data(m):
    source("a.jsonl", LINES)(m)
    shutil.rmtree("data")
    os.symlink("/proc", "data")  # nobody can make a file there, not even root


LOCAL = "prepare --name=mine --tokenizer=bytes --source=texts/*"
WORDS = [{"text": t} for t in make_documents(3, train=3, held_out=1)]
LINES = "".join(json.dumps(r) + "\n" for r in WORDS)

# (the case, the command, what its line must say, what is wrong beforehand). {run}, {backbone}: the folders. A command of train.py
# or study.py gets the words of a tiny run besides.
CASES = [
    # config
    ("unknown key", "train --lerning_rate=1", ["lerning_rate", "did you mean 'learning_rate'"]),
    ("key far from any", "train --zzzzz=1", ["zzzzz", "known:"]),
    ("help", "train --help", ["help"]),
    ("a word for a number", "train --max_iters=ten", ["max_iters", "ten", "int"]),
    ("a float for an int", "train --max_iters=2.5", ["max_iters", "2.5", "int"]),
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
    ("a negative seed", "train --seed=-1", ["seed", "-1", "0 or more"]),
    ("a seed beyond 64 bits", "train --seed=99999999999999999999", ["seed", "99999999999999999999"]),
    ("a negative number of threads", "train --threads=-2", ["threads", "-2", "0 or more"]),
    ("beta of 1", "train --beta1=1", ["beta1", "1"]),
    ("a backbone of no steps", "train --backbone_iters=0", ["0", "iters", "1 or more"]),
    ("a backbone of negative steps", "train --backbone_iters=-1", ["-1", "iters", "1 or more"]),
    ("a backbone of no rows", "train --backbone_batch_size=0", ["0", "batch_size", "1 or more"]),
    ("a backbone with a negative rate", "train --backbone_lr=-1", ["-1", "0 or more"]),
    ("heads that do not divide the width", "train --n_head=3", ["n_embd=16", "n_head=3", "multiple"]),
    ("a latent wider than the model", "train --latent=17", ["latent=17", "n_embd=16", "<="]),
    ("more labelled layers than controlled", "train --label_layers=3", ["label_layers=3", "2 controlled"]),
    ("another config in the same place", "train --gate_lr=0.5", ["{run}", "gate_lr", "0.5", "--overwrite"]),
    ("no config file", "train config/g3_ful_aux.py", ["config/g3_ful_aux.py"]),
    ("no config file, a short option", "train -h", ["-h"]),
    ("a folder for a config file", "train out", ["out"]),
    ("syntax error", "train bad.py", ["bad.py", "key = value"], config_file("seed = = 3\n")),
    ("a program, not a config", "train bad.py", ["bad.py:1", "key = value"], config_file("import os\nos.mkdir('executed')\n")),
    ("a call in a config", "train bad.py", ["bad.py:1", "seed", "literals"], config_file("seed = __import__('os').mkdir('executed')\n")),
    ("an attribute in a config", "train bad.py", ["bad.py:1", "seed", "literals"], config_file("seed = (1).bit_length()\n")),
    ("binary, not a config", "train bad.py", ["bad.py", "key = value"], config_file(bytes(range(256)))),
    ("a zero byte in a config", "train bad.py", ["bad.py", "key = value"], config_file("seed = 1\0")),
    ("json, not a config", "train bad.py", ["bad.py", "key = value"], config_file('{"seed": 1}')),
    ("unknown key in a file", "train bad.py", ["bad.py:2", "sed", "did you mean 'seed'"], config_file("n_layer = 3\nsed = 1\n")),
    ("wrong type in a file", "train bad.py", ["bad.py:1", "seed", "'1'", "int"], config_file("seed = '1'\n")),
    ("an unset name in a file", "train bad.py", ["bad.py:1", "sead", "already set"], config_file("seed = sead + 1\n")),
    ("a division by zero in a file", "train bad.py", ["bad.py:1", "seed", "zero"], config_file("seed = 1 // 0\n")),
    ("scale after recipe", "train config/best.py config/small.py", ["small.py", "before the recipe"],
     lambda m: shutil.copytree(HERE / "config", "config")),
    ("an output folder that cannot be made", "train --out_dir=/proc/nowhere/run", ["/proc/nowhere/run", "--out_dir"]),
    ("a batch that the processes cannot share", "train --seed=1", ["batch_size=4", "3 processes", "multiple"], three_processes),
    # data that is read
    ("no such data", "train --dataset=nope", ["data/nope", "prepare.py"]),
    ("no train.bin", "train --seed=1", ["train.bin is missing", "--overwrite"], lambda m: (DATA / "train.bin").unlink()),
    ("no test.bin though meta lists it", "train --seed=1", ["test.bin is missing", "--overwrite"], lambda m: (DATA / "test.bin").unlink()),
    ("an empty bin", "train --seed=1", ["val.bin", "0 tokens", "--block_size"], in_bin("val.bin", lambda b: b"")),
    ("a bin cut at an odd byte", "train --seed=1", ["train.bin", "odd", "--overwrite"], in_bin("train.bin", lambda b: b[:-1])),
    ("a bin cut at a token", "train --seed=1", ["train.bin", "meta.json", "--overwrite"], in_bin("train.bin", lambda b: b[:-2])),
    ("a bin shorter than a block", "train --block_size=4096", ["val.bin", "block_size + 1 = 4097", "smaller"]),
    ("ids beyond the vocabulary", "train --seed=1", ["train.bin", "300", "257", "--overwrite"], of_another_vocabulary),
    ("a changed bin", "train --seed=1", ["val.bin", "meta.json", "--overwrite"], in_bin("val.bin", lambda b: b"a\0" + b[2:])),
    ("a folder for a bin", "train --seed=1", ["train.bin"], lambda m: ((DATA / "train.bin").unlink(), (DATA / "train.bin").mkdir())),
    ("meta that is no json", "train --seed=1", ["meta.json is broken", "--overwrite"], in_bin("meta.json", lambda b: b[:40])),
    ("meta that is no UTF-8", "train --seed=1", ["meta.json is broken", "--overwrite"], in_bin("meta.json", lambda b: b"\xff" + b)),
    ("meta that is a list", "train --seed=1", ["meta.json is broken", "--overwrite"], in_bin("meta.json", lambda b: b"[]")),
    ("meta without a tokenizer", "train --seed=1", ["meta.json is broken", "tokenizer"], in_meta(lambda meta: meta.pop("tokenizer"))),
    ("meta with an unknown tokenizer", "train --seed=1", ["klingon"], in_meta(lambda meta: meta.update(tokenizer="klingon"))),
    ("meta with a vocabulary in words", "train --seed=1", ["meta.json is broken", "many"], in_meta(lambda meta: meta.update(vocab_size="many"))),
    ("meta with a vocabulary in quotes", "train --seed=1", ["meta.json", "257"], in_meta(lambda meta: meta.update(vocab_size="257"))),
    ("meta without splits", "train --seed=1", ["meta.json is broken", "--overwrite"], in_meta(lambda meta: meta.update(splits={}))),
    ("meta with another count", "train --seed=1", ["val.bin", "meta.json", "--overwrite"], in_meta(lambda meta: meta["splits"]["val"].update(tokens=5))),
    ("meta with another hash", "train --seed=1", ["test.bin", "meta.json", "--overwrite"], in_meta(lambda meta: meta["splits"]["test"].update(sha256="0"))),
    # data that is made
    ("a glob that matches nothing", "prepare --name=mine --tokenizer=bytes --source=nowhere/*.txt", ["nowhere/*.txt", "matches no file", "glob"]),
    ("files of two kinds", LOCAL, ["parquet", "txt", "one kind"], lambda m: (parquet(text=["a"])(m), Path("texts/a.txt").write_text("a"))),
    ("files of no known kind", LOCAL, ["csv", "parquet, jsonl or txt"], source("a.csv", "text\na\n")),
    ("parquet without text", LOCAL, ["`text`", "content", "rename"], parquet(content=["a", "b"])),
    ("parquet with a number for text", LOCAL, ["`text`"], parquet(text=[1, 2])),
    ("a broken parquet", LOCAL, ["texts/"], broken_parquet),
    ("jsonl without text", LOCAL, ["`text`", "content", "rename"], source("a.jsonl", '{"content": "a"}\n')),
    ("jsonl with null for text", LOCAL, ["`text`"], source("a.jsonl", LINES + '{"text": null}\n')),
    ("broken jsonl", LOCAL, ["texts/"], source("a.jsonl", LINES + '{"text": "a\n')),
    ("jsonl in invalid UTF-8", LOCAL, ["texts/"], source("a.jsonl", LINES.encode() + b'{"text": "\xff\xfe"}\n')),
    ("txt in invalid UTF-8", LOCAL, ["texts/", "UTF-8"], source("a.txt", b"good \xff\xfe bad")),
    ("empty documents only", LOCAL, ["texts/*", "no document", "more documents"], source("a.jsonl", '{"text": ""}\n' * 100)),
    ("an empty file", LOCAL, ["texts/"], source("a.jsonl", "")),
    ("too few documents for a split", LOCAL, ["texts/*", "no document in", "more documents"], source("a.jsonl", '{"text": "one"}\n')),
    ("data that exists", "prepare --name=tiny --tokenizer=bytes --source=texts/*", ["data/tiny exists already", "--overwrite"], source("a.jsonl", LINES)),
    ("data without a name", "prepare --source=texts/*", ["texts/*", "--name=NAME"]),
    ("a path for a name", "prepare --name=../mine --source=texts/*", ["../mine", "plain folder name"]),
    ("a hidden name", "prepare --name=.mine --source=texts/*", [".mine", "plain folder name"]),
    ("an unknown tokenizer", "prepare --name=mine --source=texts/* --tokenizer=byte", ["'byte'", "did you mean 'bytes'"]),
    ("a vocabulary that cannot be fetched", "prepare --name=mine --source=texts/*", ["gpt2", "TIKTOKEN_CACHE_DIR"], no_gpt2),
    ("a count in words", LOCAL + " --tokens=many", ["many", "200M"], source("a.jsonl", LINES)),
    ("a negative count", LOCAL + " --tokens=-5M", ["-5M", "200M"], source("a.jsonl", LINES)),
    ("a negative number of workers", LOCAL + " --workers=-1", ["workers", "-1"], source("a.jsonl", LINES)),
    ("unknown key of prepare.py", "prepare --tokenizr=bytes", ["tokenizr", "did you mean 'tokenizer'"]),
    ("fineweb-edu without a network", "prepare --source=fineweb-edu --tokenizer=bytes", ["fineweb-edu", "reach"], offline),
    ("a data folder that cannot be written", LOCAL, ["data/mine", "written"], no_place_for_data),
    # checkpoints
    ("sample without a run", "sample out/tiny/nope", ["out/tiny/nope", "train it first"]),
    ("eval_only without a run", "train --eval_only --seed=7", ["seed7", "train it first"]),
    ("a backbone folder without a checkpoint", "train --backbone=data --seed=1", ["data", "ckpt.pt"]),
    ("a truncated checkpoint", "sample {run}", ["ckpt.pt", "truncated", "delete"], replaced(RUN / "ckpt.pt", half)),
    ("a truncated checkpoint at a resume", "train", ["ckpt.pt", "truncated", "delete"], unfinished(replaced(RUN / "ckpt.pt", half))),
    ("a truncated checkpoint of the backbone", "train --seed=1", ["ckpt.pt", "truncated", "delete"], replaced(BACKBONE / "ckpt.pt", half)),
    ("an empty checkpoint", "sample {run}", ["ckpt.pt", "delete"], replaced(RUN / "ckpt.pt", b"")),
    ("text for a checkpoint", "sample {run}", ["ckpt.pt", "delete"], replaced(RUN / "ckpt.pt", b"hello")),
    ("a tensor for a checkpoint", "sample {run}", ["ckpt.pt", "delete"], replaced(RUN / "ckpt.pt", lambda p: torch.save(torch.zeros(3), p))),
    ("a checkpoint that lacks keys", "sample {run}", ["ckpt.pt"], replaced(RUN / "ckpt.pt", resaved(lambda c: [c.pop("backbone"), c.pop("budgets")]))),
    ("a checkpoint that lacks weights", "sample {run}", ["h.1.cheap.c_fc.bias", "missing"],
     replaced(RUN / "ckpt.pt", resaved(lambda c: c["model"].pop("h.1.cheap.c_fc.bias")))),
    ("a pickle with code", "sample {run}", ["ckpt.pt", "delete"], replaced(RUN / "ckpt.pt", pickle_with_code)),
    ("a bare pickle with code", "sample {run}", ["ckpt.pt", "delete"], replaced(RUN / "ckpt.pt", bare_pickle_with_code)),
    ("a pickle with code at a resume", "train", ["ckpt.pt", "delete"], unfinished(replaced(RUN / "ckpt.pt", pickle_with_code))),
    ("a pickle with code for a backbone", "train --seed=1", ["ckpt.pt", "delete"], replaced(BACKBONE / "ckpt.pt", pickle_with_code)),
    ("a checkpoint of another gate", "train", ["{run}", "shape"], unfinished(replaced(RUN / "ckpt.pt", "out/tiny/g1_full_aux/seed0/ckpt.pt"))),
    ("a checkpoint of a backbone at a resume", "train", ["{run}"], unfinished(replaced(RUN / "ckpt.pt", BACKBONE / "ckpt.pt"))),
    ("a backbone of another shape", "train --backbone=out/wide --seed=1", ["out/wide", "shape"], other_width),
    ("a backbone of fewer layers", "train --backbone={backbone} --n_layer=4 --seed=1", ["{backbone}", "h.3", "missing"]),
    ("a run of gates for a backbone", "train --backbone={run} --seed=1", ["{run}", "missing"]),
    ("a backbone that is no recipe", "train --backbone=backbon --seed=1", ["backbon", "did you mean 'backbone'"]),
    ("a broken config.json", "train", ["config.json", "--overwrite"], replaced(RUN / "config.json", half)),
    ("a broken summary.json", "train", ["summary.json", "--overwrite"], replaced(RUN / "summary.json", half)),
    ("a Hugging Face folder without a config", "train --backbone=hf:data --seed=1", ["data/config.json"]),
    ("Hugging Face weights that are truncated", "train --backbone=hf:gpt2 --activation=gelu_new --seed=1", ["model.safetensors"], gpt2_folder(b"\0" * 20)),
    ("Hugging Face weights without our names", "train --backbone=hf:gpt2 --activation=gelu_new --seed=1", ["wte.weight"], gpt2_folder("none of the names")),
    ("a Hugging Face model of another shape", "train --backbone=hf:gpt2 --seed=1", ["gpt2", "n_layer", "12"], gpt2_folder(b"", n_layer=12)),
    ("a Hugging Face model of another nonlinearity", "train --backbone=hf:gpt2 --seed=1", ["gelu_new", "--activation=gelu_new"], gpt2_folder(b"")),
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
    ("labels alone, and none", "train --estimator=hard --lambda_util=0 --lambda_rank=0", ["hard", "--lambda_util"]),
    ("a picture of no routing", "sample {run} --mode=full --view=x.png", ["--view", "full"]),
    ("a picture of a dense model", "sample {backbone} --view=x.html", ["--view", "full"]),
    ("an audit of nothing", "audit --rows=2", ["name the folder"]),
    ("an audit of a dense model", "audit {backbone}", ["no gates", "dense"]),
    ("an audit of a checkpoint that was not kept", "audit --checkpoint=ckpt-3.pt {run}", ["ckpt-3.pt", "does not exist"]),
    ("an unknown oracle", "train --oracle=onpolicy", ["oracle", "'onpolicy'", "did you mean 'on_policy'"]),
    ("a share of labels above 1", "train --label_share=2", ["label_share", "2", "[0, 1]"]),
    # prompts and sampling
    ("no folder", "sample --prompt=a", ["folder", "sample.py out/"]),
    ("an empty prompt", "sample {run} --prompt=", ["--prompt=''", "at least one"]),
    ("a prompt longer than the context", "sample {run} --prompt='seventeen letters'", ["17 tokens", "16", "shorten"]),
    ("a prompt that is no text", "sample {run} --prompt=a\udcff", ["prompt", "udcff"]),
    ("sampling under topk", "sample {run} --mode=topk", ["'topk'", "threshold", "future"]),
    ("sampling under an unknown mode", "sample {run} --mode=fulll", ["'fulll'", "full"]),
    ("sampling at a budget above 1", "sample {run} --budget=2", ["budget", "2", "[0, 1]"]),
    ("a budget for a backbone", "sample {backbone} --budget=0.5", ["budget", "0.5"]),
    ("a negative temperature", "sample {run} --temperature=-1", ["temperature", "0 or more"]),
    ("top_k of 0", "sample {run} --top_k=0", ["top_k", "1 or more"]),
    ("negative new tokens", "sample {run} --max_new_tokens=-1", ["max_new_tokens", "0 or more"]),
    ("a sampling seed beyond 64 bits", "sample {run} --seed=99999999999999999999", ["seed", "99999999999999999999"]),
    ("a view of an unknown kind", "sample {run} --view=a.pdf", ["a.pdf", ".html or .png"]),
    ("a view that exists", "sample {run} --view=a.html", ["a.html exists", "--overwrite"], lambda m: Path("a.html").write_text("mine")),
    ("a view in no folder", "sample {run} --view=nowhere/a.html --max_new_tokens=1", ["nowhere/a.html"]),
    ("unknown key of sample.py", "sample {run} --promt=a", ["promt", "did you mean 'prompt'"]),
    # studies
    ("an arm that does not exist", "study --arms=g1_ful_aux", ["g1_ful_aux", "did you mean 'g1_full_aux'"]),
    ("an arm twice", "study --arms=random,random", ["random", "twice"]),
    ("no seeds", "study --arms=random --seeds=", ["seeds=''", "--seeds=0,1,2"]),
    ("a seed twice", "study --arms=random --seeds=1,1", ["1,1", "twice"]),
    ("a seed in words", "study --arms=random --seeds=one", ["'one'", "--seeds=0,1,2"]),
    ("a negative seed in a study", "study --arms=random --seeds=-1", ["'-1'", "--seeds=0,1,2"]),
    ("negative jobs", "study --arms=random --jobs=-1", ["jobs", "-1"]),
    ("unknown key of study.py", "study --arm=random", ["'arm'", "did you mean"]),
    ("a report of nothing", "study --arms=random --report_only", ["out/tiny/study", "study.py"]),
    ("a bad value for every arm", "study --arms=random --budget=2", ["budget", "2", "[0, 1]"]),
    ("a study of no such data", "study --arms=random --dataset=nope", ["data/nope", "prepare.py"]),
    ("a study with no such backbone", "study --arms=random --seeds=0 --backbone=backbon", ["backbon", "did you mean 'backbone'"]),
    # the benchmark
    ("a row that the benchmark lacks", "bench --rows=memry", ["memry", "known:"]),
    ("a baseline that is no nanoGPT", "bench --baseline=nowhere", ["nowhere", "nanoGPT"]),
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
    return text.replace("{run}", str(RUN)).replace("{backbone}", str(BACKBONE))


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
    signal.alarm(40)
    yield
    signal.alarm(0)


def shown(warning):
    """Would Python print this warning on stderr by default?"""
    return not issubclass(warning.category, (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning))


@pytest.mark.parametrize("text, needles, prepared", [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_bad_input_is_refused_in_one_line_and_changes_nothing(text, needles, prepared, done, monkeypatch, capfd, recwarn, in_time):
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


def test_there_are_at_least_40_different_cases():
    assert len({case[0] for case in CASES}) == len(CASES) >= 40


END_TO_END = ["unknown key", "a bare pickle with code", "broken jsonl", "a prompt that is no text", "a seed twice"]


@pytest.mark.parametrize("name", END_TO_END)
def test_bad_input_from_a_shell(name, done, monkeypatch):
    [(_, text, needles, prepared)] = [case for case in CASES if case[0] == name]
    prepared(monkeypatch)
    script, words = command(text)
    before = snapshot()
    code, out, err = finish(start(HERE / f"{script}.py", *words))
    assert code == 2
    check_line(err, needles)
    assert snapshot() == before


def test_a_pickle_with_code_would_have_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, "ckpt.pt")
    torch.load("ckpt.pt", weights_only=False)
    assert Path("executed").is_dir()


# -----------------------------------------------------------------------------
# fuzz

LITERALS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                        lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.integers(), inner, max_size=2))
NASTY = st.sampled_from(["{[]:1}", "{{}}", "1" + "0" * 400, "9" * 5000, "1e999", "[" * 300, "-" * 3000 + "1", "'", "\\", "(", "1j", "b''", "[[1]]", "..."])
KEYS = st.sampled_from(sorted(train.DEFAULTS)) | st.text(max_size=8)
VALUES = st.text(max_size=12) | LITERALS.map(repr) | NASTY


def resolve(words):
    """The config of these words, or None when they were refused in one line."""
    try:
        config = train.validate(configure(train.DEFAULTS, words))
    except ConfigError as error:
        assert str(error).strip()
        return None
    assert config.keys() == train.DEFAULTS.keys()
    assert all(type(v) is type(train.DEFAULTS[k]) for k, v in config.items())
    return config


@given(st.lists(st.tuples(KEYS, VALUES), max_size=4))
@example([("seed", "{[]:1}")])
@example([("learning_rate", "1" + "0" * 400)])
@example([("controlled", "[[1]]")])
@example([("controlled", "[1, 'a']")])
def test_any_words_give_a_config_or_one_error(pairs):
    resolve([f"--{key}={value}" for key, value in pairs])


@given(st.sampled_from(sorted(train.DEFAULTS)), LITERALS)
def test_a_value_that_is_taken_is_the_value_that_was_given(key, value):
    text = value if isinstance(train.DEFAULTS[key], str) and isinstance(value, str) else repr(value)
    config = resolve([f"--{key}={text}"])
    if config is not None and type(train.DEFAULTS[key]) is not str:
        assert config[key] == (list(value) if isinstance(value, tuple) else value) or config[key] == [value]


LINE = st.builds(lambda key, sep, value: f"{key}{sep}{value}\n".encode("utf-8", "replace"), KEYS, st.sampled_from([" = ", "=", " += ", ": "]), VALUES)


@given(st.binary(max_size=40) | st.lists(LINE | st.binary(max_size=6), max_size=4).map(b"".join))
@example(b"learning_rate = 1" + b"0" * 400)
@example(b"controlled = [[1]]")
@example(b"seed = " + b"-" * 3000 + b"1")
@example(b"seed = " + b"(" * 300)
@example(b"recipe = 10 ** 5000")
def test_any_bytes_as_a_config_file_give_a_config_or_one_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.py"
    path.write_bytes(content)
    resolve([str(path)])
