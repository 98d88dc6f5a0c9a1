"""Runs: the same numbers every time, nothing lost, nothing mixed with what was made otherwise, and what goes
wrong said in one line."""
import contextlib
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import machine
import run as run_module
import train
from configurator import ConfigError
from conftest import (HERE, finish, go, log_of, losses_of, recipe, snapshot, start, steps_of, summary_of,
                      tiny, write_documents, write_plugin)
from metrics import describe

RUN, BACKBONE = "out/tiny/g3_full_aux/seed0", "out/tiny/backbone/seed0"


class Stopped(Exception):
    """A run is over at once, as after a crash."""


@contextlib.contextmanager
def at_step(step, what):
    """Within this, what() is called before training reads the batch of a step."""
    real = train.get_batch

    def get_batch(data, config, now, micro, machine):
        if now == step:
            what()
        return real(data, config, now, micro, machine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "get_batch", get_batch)
        yield


def stop():
    raise Stopped


def train_until(step, *words):
    with at_step(step, stop), contextlib.suppress(Stopped):
        go("train", *words)
        raise AssertionError(f"step {step} was not trained")


def checkpoint_of(folder):
    return torch.load(Path(folder) / "ckpt.pt", weights_only=True)


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_clock(summary):
    return {key: value for key, value in summary.items() if key not in ("seconds", "machine")}


def check_same_run(a, b):
    """Two runs logged the same numbers and ended with the same weights and thresholds."""
    assert log_of(a) == log_of(b)
    assert same(checkpoint_of(a)["model"], checkpoint_of(b)["model"])
    assert without_clock(summary_of(a)) == without_clock(summary_of(b))


# Gates, labels and losses of a fork, most of them broken.
FORK = '''
import math
from gates import GATES, LABELS, LOSSES, JEPAGate, Label, Loss, MLPGate


@GATES.register("nan")
class GateOfNan(MLPGate):
    def forward(self, h, context):
        return super().forward(h, context)[0] * math.nan, None


@GATES.register("saturated")
class SaturatedGate(MLPGate):
    def forward(self, h, context):
        return super().forward(h, context)[0] + 20 * (self.layer == 2), None


@GATES.register("blind")
class BlindGate(JEPAGate):
    def forward(self, h, context):
        scores, prediction = super().forward(h, context)
        return scores, prediction[:, :, :1].expand_as(prediction)


@LABELS.register("nan")
class LabelOfNan(Label):
    def __call__(self, trace, route):
        return route.h.norm(dim=-1) * math.nan


@LABELS.register("writing")
class WritingLabel(Label):
    def __call__(self, trace, route):
        trace.model.h[0].mlp.c_fc.weight.data[0, 0] += 1e-4
        return route.h.norm(dim=-1)


@LOSSES.register("late")
class LateLoss(Loss):
    """Not a number from step 3 on."""

    def __init__(self):
        self.step = -1

    def __call__(self, trace):
        self.step += 1
        return trace.routes[0].scores.mean() * (math.nan if self.step == 3 else 1.0)
'''


# -----------------------------------------------------------------------------
# resume

@pytest.mark.parametrize("name", ["backbone", "g3_full_aux", "best", "static"])
def test_stopped_and_resumed_is_the_undisturbed_run(name, place):
    words = tiny(recipe(name), "--max_iters=10", "--eval_interval=3")
    go("train", *words, "--out_dir=out/calm")
    for step in (0, 2, 7, 7, 9):  # the first two are before the first checkpoint
        train_until(step, *words, "--out_dir=out/stopped")
    assert "resuming out/stopped at step 9" in go("train", *words, "--out_dir=out/stopped")
    check_same_run("out/calm", "out/stopped")


# Where a run dies: Python that a child process runs first. die_at(owner, name, n) kills at the n-th call of
# owner.name; with `after`, when the call is done.
KILLS = {
    "a checkpoint written but not renamed": "die_at(os, 'replace', 2, when=is_checkpoint)",
    "the first checkpoint not renamed": "die_at(os, 'replace', 1, when=is_checkpoint)",
    "a checkpoint written and nothing more": "die_at(os, 'replace', 2, when=is_checkpoint, after=True)",
    "in the middle of a step": "die_at(torch.nn.utils, 'clip_grad_norm_', 4)",
    "while its backbone trains": "shutil.rmtree('out/tiny/backbone'); "
                                 "die_at(torch.nn.utils, 'clip_grad_norm_', 3)",
}
DYING = """
import json, os, shutil, signal, sys
import torch
import train

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports a thousand modules at its first use

def is_checkpoint(a, b):
    return b.endswith("ckpt.pt")

def die_at(owner, name, n, when=lambda *words: True, after=False):
    real, calls = getattr(owner, name), []
    def wrapped(*words, **options):
        calls.append(when(*words))
        dies = calls[-1] and sum(calls) == n
        if dies and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*words, **options)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, wrapped)

for folder, kill in json.loads(sys.argv.pop(1)):
    pid = os.fork()  # of a process that has imported torch and done nothing with it
    if pid == 0:
        os.chdir(folder)
        exec(kill)
        train.main()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, kill
"""


@pytest.fixture(scope="module")
def killed(templates, tmp_path_factory):
    """{where: a folder in which a run was killed there}, and under "" one with an undisturbed run."""
    folders = {where: tmp_path_factory.mktemp("killed") / "place" for where in ["", *KILLS]}
    for folder in folders.values():
        shutil.copytree(templates / "place", folder)
    kills = [(str(folders[where]), kill) for where, kill in KILLS.items()]
    child = start("-c", DYING, json.dumps(kills), *tiny("--keep_checkpoints"))
    with contextlib.chdir(folders[""]):
        go("train", *tiny("--keep_checkpoints"))
    code, out, err = finish(child)
    assert code == 0, out + err
    return folders


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_run_ends_with_the_numbers_of_an_undisturbed_one(where, killed, monkeypatch):
    monkeypatch.chdir(killed[where])
    calm = killed[""] / RUN
    assert not Path(RUN, "summary.json").exists()
    if Path(RUN).exists():
        shutil.copytree(RUN, "out/rarely")
    # In a copy, with another number of log lines and evaluations ...
    go("train", *tiny("--out_dir=out/rarely", "--log_interval=4", "--eval_interval=3"))
    assert losses_of("out/rarely").items() <= losses_of(calm).items()
    assert same(checkpoint_of("out/rarely")["model"], checkpoint_of(calm)["model"])
    assert all(summary_of("out/rarely")[split] == summary_of(calm)[split] for split in ("val", "test"))
    # ... and by the same command.
    go("train", *tiny("--keep_checkpoints"))
    assert log_of(RUN) == log_of(calm)
    assert {p.name for p in Path(RUN).iterdir()} - {"lock"} == {p.name for p in calm.iterdir()} - {"lock"}
    for name in ("ckpt-2.pt", "ckpt-4.pt", "ckpt.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (Path(RUN), calm))
        assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])


@pytest.mark.parametrize("step, every", [(0, 100), (3, 2), (4, 2), (5, 2)])
def test_sigterm_finishes_the_step_saves_and_loses_nothing(step, every, place):
    words = tiny(f"--eval_interval={every}")
    go("train", *words, "--out_dir=out/calm")
    with at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert exit_code_of("train", *words) == 143
    assert checkpoint_of(RUN)["step"] == step + 1
    out = go("train", *words)
    assert f"resuming {RUN} at step {step + 1}" in out
    check_same_run(RUN, "out/calm")


def exit_code_of(*words):
    try:
        go(*words)
    except SystemExit as end:
        return end.code  # and not the exception, which would hold the run and its lock


def test_another_number_of_threads_is_said(place):
    train_until(4, *tiny())
    try:
        out = go("train", *tiny("--threads=2"))
    finally:
        torch.set_num_threads(1)
    assert "the last bits" in out and "1 threads" in out and "2 threads" in out
    assert "1 threads" in summary_of(RUN)["machine"] and "2 threads" in summary_of(RUN)["machine"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(place):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(ord(out))  # the state that a run finds does not matter
        go("train", *tiny(recipe("best"), f"--seed={seed}", f"--out_dir=out/{out}"))
    check_same_run("out/a", "out/b")
    assert not set(losses_of("out/a").values()) & set(losses_of("out/c").values())


# -----------------------------------------------------------------------------
# a folder holds one run

def test_a_finished_run_is_left_alone(done):
    before = snapshot()
    words = tiny("--log_interval=7", "--eval_interval=5", "--keep_checkpoints")
    assert "finished already" in go("train", *words)
    assert snapshot() == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("word", ["--gate_lr=0.5", "--lambda_rank=0.25", "--max_iters=7", "--n_embd=32",
                                  "--backbone_iters=5", "--backbone_seed=1", "--label_target=dense"])
def test_another_config_is_refused_by_its_key_and_changes_nothing(word, finished, done):
    if not finished:
        os.remove(f"{RUN}/summary.json")
    before = snapshot()
    key, _, value = word[2:].partition("=")
    with pytest.raises(ConfigError, match=rf"{key} \(there .*, here '?{value}.*--overwrite"):
        go("train", *tiny(word))
    assert snapshot() == before


def test_a_folder_in_which_another_process_trains_is_refused(place):
    Path(RUN).mkdir(parents=True)
    with FileLock(f"{RUN}/lock"), pytest.raises(ConfigError, match=f"another process is training in {RUN}"):
        go("train", *tiny())
    go("train", *tiny())


def test_overwrite_replaces_a_run_but_never_the_backbone_of_this_one(done):
    go("train", *tiny("--overwrite", "--gate_lr=0.5"))
    assert json.loads(Path(RUN, "config.json").read_text())["config"]["gate_lr"] == 0.5
    assert [r["step"] for r in steps_of(RUN)] == [0, 1, 2, 3, 4, 5]
    before = snapshot()
    for folder in (BACKBONE, Path(BACKBONE).absolute()):
        with pytest.raises(ConfigError, match="holds the backbone of this run"):
            go("train", *tiny("--overwrite", f"--out_dir={folder}"))
    assert snapshot() == before


# -----------------------------------------------------------------------------
# the text is the run's own

def test_another_text_in_the_place_of_the_runs_is_refused_before_anything_is_trained(done):
    write_documents("other.jsonl", seed=9)
    go("prepare", "--source=other.jsonl", "--name=tiny", "--tokenizer=bytes", "--overwrite")
    before = snapshot("out")
    with pytest.raises(ConfigError, match="the train text"):
        go("train", *tiny())
    for words in (["train", *tiny("--eval_only")], ["train", *tiny("--eval_only", "--budget=0.25")],
                  ["sample", RUN, "--budget=0.25"]):
        with pytest.raises(ConfigError, match="data/tiny is not the text that"):
            go(*words)
    assert snapshot("out") == before
    assert go("sample", RUN, "--max_new_tokens=2")  # it needs no text
    # A new run gets a backbone of the new text, beside the old one.
    assert "training it once" in go("train", *tiny("--seed=1")) and before.items() <= snapshot("out").items()


def evaluated(*words):
    """-> (what --eval_only printed, its record)."""
    out = go("train", *tiny("--eval_only", *words))
    return out, json.loads(out.splitlines()[-1])


def test_eval_only_at_the_runs_budget_is_the_summary_and_at_another_budget_is_not(done):
    before = snapshot()
    _, own = evaluated()
    assert own["val"] == summary_of(RUN)["val"] and own["step"] == 6
    for budget in (0, 0.25, 1):
        _, other = evaluated(f"--budget={budget}")
        assert other["budget"] == budget and other["val"]["topk"]["budget"] == [budget] * 2
        assert other["val"]["threshold"]["budget"] == pytest.approx([budget] * 2, abs=0.1)
        assert other["val"]["threshold"]["loss"] != own["val"]["threshold"]["loss"]
    assert other["val"]["threshold"]["agreement"] == 1 and other["val"]["threshold"]["kl"] < 1e-6
    assert snapshot() == before


def test_eval_only_says_the_step_of_an_unfinished_run_and_refuses_another_run(place):
    train_until(5, *tiny())
    out, result = evaluated()
    assert "stands at step 4 of 6" in out and result["step"] == 4
    for word, key in (("--max_iters=4", "max_iters"), ("--gate_lr=0.5", "gate_lr")):
        with pytest.raises(ConfigError, match=rf"{key} \(there"):
            evaluated(word)
    with pytest.raises(ConfigError, match="seed1/ckpt.pt does not exist; train it first"):
        evaluated("--seed=1")


def test_eval_only_on_another_text_tells_a_budget_far_from_the_asked_one(done):
    out, _ = evaluated()
    assert "the realised budget" not in out
    Path("other.jsonl").write_text("".join(json.dumps({"text": "0" * n}) + "\n" for n in range(50, 200)))
    go("prepare", "--source=other.jsonl", "--name=other", "--tokenizer=bytes")
    out, result = evaluated("--dataset=other")
    realised = sum(result["val"]["threshold"]["budget"]) / 2
    assert abs(realised - 0.5) > 0.1 and f"the realised budget is {realised:.2f} where 0.50 was asked" in out


def test_a_text_in_other_tokens_is_refused(done):
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    shutil.copytree("data/tiny", "data/other")
    Path("data/other/meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2", "vocab_size": 50257}))
    with pytest.raises(ConfigError, match="other is in the tokens of gpt2, and the run in those of bytes"):
        evaluated("--dataset=other")


# -----------------------------------------------------------------------------
# checkpoints

class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("use", ["resume", "eval_only", "sample", "backbone"])
@pytest.mark.parametrize("broken", ["code", "truncated", "empty"])
def test_a_checkpoint_that_is_broken_or_has_code_in_it_is_refused_in_one_line(broken, use, done):
    path = Path(BACKBONE if use == "backbone" else RUN, "ckpt.pt")
    if broken == "code":
        torch.save({**torch.load(path, weights_only=True), "model": Code()}, path)
    else:
        os.truncate(path, os.path.getsize(path) // 2 if broken == "truncated" else 0)
    if use == "resume":
        os.remove(f"{RUN}/summary.json")
    command = {"sample": ["sample", RUN], "eval_only": ["train", *tiny("--eval_only")],
               "backbone": ["train", *tiny("--seed=1")]}
    with pytest.raises(ConfigError) as error:
        go(*command.get(use, ["train", *tiny()]))
    assert f"{path} is not a checkpoint" in str(error.value) and "--overwrite" in str(error.value)
    assert "\n" not in str(error.value) and not Path("executed").exists()


@pytest.mark.parametrize("use", ["resume", "eval_only", "sample"])
def test_a_backbone_that_has_changed_is_refused(use, done):
    checkpoint = torch.load(f"{BACKBONE}/ckpt.pt", weights_only=True)
    checkpoint["model"]["h.1.mlp.c_fc.weight"][0, 0] += 1e-3
    torch.save(checkpoint, f"{BACKBONE}/ckpt.pt")
    command = {"sample": ["sample", RUN], "eval_only": ["train", *tiny("--eval_only")]}
    with pytest.raises(ConfigError, match="another backbone|the backbone's weights"):
        go(*command.get(use, ["train", *tiny()]))


def test_a_backbone_of_another_shape_is_refused(place):
    go("train", *tiny(recipe("backbone"), "--n_embd=32", "--max_iters=1", "--out_dir=out/wide"))
    with pytest.raises(ConfigError, match="out/wide is of another shape"):
        go("train", *tiny("--backbone=out/wide"))


def test_a_copied_out_is_sampled_without_the_text(done, tmp_path, monkeypatch):
    shutil.copytree("out", tmp_path / "elsewhere" / "out")
    shutil.rmtree(done)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert go("sample", RUN, "--max_new_tokens=2")
    shutil.rmtree("out/tiny/backbone")
    with pytest.raises(ConfigError, match="the backbone of .* is not there any more; put it back"):
        go("sample", RUN)


# -----------------------------------------------------------------------------
# the frozen backbone

@pytest.mark.parametrize("name", ["g3_full_aux", "best", "linear", "static", "full_adapter", "cheap_only"])
def test_only_the_controllers_train_and_the_backbone_ends_as_it_began(name, place, monkeypatch):
    held, real = [], run_module.make_optimizers

    def make_optimizers(model, config, dtype):
        optimizers = real(model, config, dtype)
        held.append((model, {n: p.detach().clone() for n, p in model.named_parameters()}, optimizers))
        return optimizers

    monkeypatch.setattr(run_module, "make_optimizers", make_optimizers)
    go("train", *tiny(recipe(name)))
    [(model, start_weights, optimizers)] = held
    names = {id(p): n for n, p in model.named_parameters()}
    optimized = {names[id(p)] for o in optimizers for group in o.param_groups for p in group["params"]}
    controllers = {n for n in start_weights if re.match(r"h\.[12]\.(cheap|gate)\.", n)}
    if name in ("full_adapter", "cheap_only"):
        controllers = {n for n in controllers if ".cheap." in n}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start_weights[n])}
    assert optimized == controllers and moved <= controllers and any(".cheap." in n for n in moved)
    dense, summary = checkpoint_of(BACKBONE)["model"], summary_of(f"out/tiny/{name}/seed0")
    assert all(torch.equal(p, dense[n]) for n, p in model.backbone().items())
    assert summary["backbone"]["weights"] == run_module.weights_hash({n: dense[n] for n in model.backbone()})
    assert summary["trained_parameters"] == sum(start_weights[n].numel() for n in controllers)


def test_what_writes_to_the_backbone_is_caught_and_never_ends_as_a_run(place, forget):
    words = tiny(recipe("g1_full_aux"), write_plugin(FORK), "--oracle=writing", "--recipe=mine")
    for _ in range(2):  # and not the second time either
        with pytest.raises(ConfigError, match="frozen weight moved"):
            go("train", *words)
    assert not Path("out/tiny/mine/seed0/summary.json").exists()


@pytest.mark.parametrize("word", ["--backbone_iters=5", "--backbone_lr=1e-4", "--backbone_seed=1",
                                  "--n_embd=32", "--bias=False"])
def test_another_dense_model_is_another_backbone_and_leaves_the_first(word, place):
    before = snapshot(BACKBONE)
    assert "training it once" in go("train", *tiny(word, "--max_iters=1"))
    path = summary_of(RUN)["backbone"]["path"]
    assert path != str(Path(BACKBONE).absolute()) and snapshot(BACKBONE) == before
    assert "training it once" not in go("train", *tiny(word, "--max_iters=1", "--seed=1"))
    assert summary_of("out/tiny/g3_full_aux/seed1")["backbone"]["path"] == path


def test_how_a_gate_trains_does_not_ask_for_another_backbone(place):
    words = ["--batch_size=2", "--gradient_accumulation_steps=2", "--grad_clip=0.5", "--beta2=0.99",
             "--seed=3", "--learning_rate=0.01", "--weight_decay=0", "--eval_interval=1", "--controlled=[2]",
             "--budget=0.25", "--lambda_distill=1", "--budget_fall=0.5", "--min_lr_ratio=0.5",
             "--muon_lr=0.02"]
    assert "training it once" not in go("train", *tiny(*words, "--recipe=mine", "--max_iters=1"))


# -----------------------------------------------------------------------------
# a fork of the code: a new key of the model

MAINS = """
import contextlib, io, json, sys
import train
from configurator import ConfigError

for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            train.main()
        except ConfigError as error:
            print("refused:", error)
    print(json.dumps(out.getvalue()))
"""


def fork_with_a_key(folder):
    """Our files with one more key of the model, embed_scale."""
    edits = {"model.py": {"class GPTConfig:\n": "class GPTConfig:\n    embed_scale: float = 1.0\n",
                          "self.wte(context.tokens).float()":
                          "self.wte(context.tokens).float() * self.config.embed_scale"},
             "train.py": {"DEFAULTS = dict(\n": "DEFAULTS = dict(\n    embed_scale=1.0,\n"}}
    shutil.copytree(HERE / "config", folder / "config")
    for path in HERE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for old, new in edits.get(path.name, {}).items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        (folder / path.name).write_text(text, encoding="utf-8")


def test_a_forks_new_key_counts_for_runs_and_backbones_and_its_default_does_not(done, tmp_path):
    fork = tmp_path / "fork"
    fork.mkdir()
    fork_with_a_key(fork)
    before = snapshot("out")
    short, scaled = "--max_iters=2", "--embed_scale=2.0"
    commands = [tiny(), tiny("--seed=1", short), tiny(scaled), tiny(scaled, short, "--recipe=a"),
                tiny(scaled, short, "--recipe=b"), tiny("--eval_only")]
    code, out, err = finish(start("-c", MAINS, json.dumps(commands), env={"PYTHONPATH": str(fork)}))
    assert code == 0, err
    old, reused, refused, anew, again, looked_at = map(json.loads, out.splitlines())
    assert "finished already" in old  # a run without the key is one at its default
    assert "training it once" not in reused  # and so is a backbone
    assert f"backbone {BACKBONE} was made by other code" in reused.replace(f"{done}/", "")
    assert "refused:" in refused and "embed_scale (there 1.0, here 2.0)" in refused
    assert "training it once" in anew and "training it once" not in again
    paths = [summary_of(f"out/tiny/{name}/seed0")["backbone"]["path"] for name in ("a", "b", "g3_full_aux")]
    assert paths[0] == paths[1] != paths[2]
    assert f"{RUN} was made by other code" in looked_at and '"step": 6' in looked_at
    assert {path: snapshot("out")[path] for path in before} == before


# -----------------------------------------------------------------------------
# what is not finite

@pytest.mark.parametrize("words, says", [
    (["--gate=nan"], "step 0: the score of the gate of layer 1 is not finite"),
    (["--oracle=nan", "--label_layers=2"], "step 0: the label of layer 1 is not finite"),
    (["--lambda_late=1"], "step 3: the late loss is not finite; the last checkpoint is kept. Give a lower ")])
def test_what_is_not_finite_is_named_with_its_place(words, says, place, forget):
    with pytest.raises(ConfigError) as error:
        go("train", *tiny(recipe("g1_full_aux"), write_plugin(FORK), *words, "--recipe=mine"))
    assert says in str(error.value)
    assert ("--learning_rate" in str(error.value)) == ("step 3" in says)  # at step 0 it is no advice


@pytest.mark.parametrize("name", ["g3_full_aux", "best"])
def test_a_backbone_that_is_not_finite_is_named(name, done):
    checkpoint = torch.load(f"{BACKBONE}/ckpt.pt", weights_only=True)
    checkpoint["model"]["h.2.mlp.c_fc.weight"][0, 0] = math.nan
    torch.save(checkpoint, f"{BACKBONE}/ckpt.pt")
    with pytest.raises(ConfigError, match=r"step 0: the weight h.2.mlp.c_fc.weight is not finite$"):
        go("train", *tiny(recipe(name), "--seed=1"))


@pytest.mark.parametrize("step", [1, 3, 5])
def test_weights_that_break_right_before_an_evaluation_reach_no_checkpoint(step, place, monkeypatch):
    real = train.train_step

    def train_step(run, logged):
        values = real(run, logged)
        if run.step == step:
            run.model.h[1].cheap.c_proj.weight.data.fill_(math.inf)
        return values

    monkeypatch.setattr(train, "train_step", train_step)
    name = "h.1.cheap.c_proj.weight"
    with pytest.raises(ConfigError, match=f"step {step + 1}: the weight {name} is not finite.* is kept"):
        go("train", *tiny())
    assert Path(RUN, "ckpt.pt").exists() == (step > 1)
    if step > 1:
        checkpoint = checkpoint_of(RUN)
        assert checkpoint["step"] == step - 1 and checkpoint["model"][name].isfinite().all()


# -----------------------------------------------------------------------------
# what is said

def test_dead_gates_are_said(place, forget):
    words = [recipe("g1_no_utilrank"), write_plugin(FORK), "--gate=saturated", "--recipe=mine"]
    assert "step 0: the gates of layers [2] are dead" in go("train", *tiny(*words, "--estimator=ste"))
    # Standardised scores do not care for what all of them share.
    assert "are dead" not in go("train", *tiny(*words, "--estimator=ste_norm", "--overwrite"))


def test_collapsed_predictors_are_said(place, forget):
    out = go("train", *tiny(write_plugin(FORK), "--gate=blind", "--recipe=mine"))
    assert out.count("the predictors of layers [1, 2] have collapsed") == 3  # at steps 2, 4 and 6
    health = [record["health"] for record in log_of("out/tiny/mine/seed0") if "val" in record]
    assert len(health) == 4 and all(layers["1"]["collapsed"] for layers in health)


def test_a_topk_loss_is_said_to_be_not_causal_wherever_it_is_printed(done):
    out = go("train", *tiny("--overwrite"))
    lines = [line for line in out.splitlines() if "under topk" in line]
    assert len(lines) == 5 and all("under topk (not causal)" in line for line in lines)


def test_every_evaluation_has_the_loss_the_budget_the_kl_and_the_agreement(done):
    evaluations = [record for record in log_of(RUN) if "val" in record]
    assert [record["step"] for record in evaluations] == [0, 2, 4, 6]
    for record in evaluations:
        assert record["val"].keys() == {"topk", "threshold", "full"}
        for mode, result in record["val"].items():
            assert result.keys() == {"loss", "budget", "kl", "agreement"} and 0 <= result["agreement"] <= 1
            assert len(result["budget"]) == (0 if mode == "full" else 2)
        assert record["val"]["full"]["kl"] == 0 and record["val"]["full"]["agreement"] == 1
    assert summary_of(RUN)["evaluations"] == [{"step": r["step"], **r["val"]} for r in evaluations]
    words = describe(evaluations[-1]["val"])
    assert re.search(r"\d under threshold \(KL \d\.\d+, \d+% as the dense model\)", words)


def test_the_losses_that_train_and_those_that_do_not_apply_are_said(place):
    assert "losses: lm, jepa, util, rank\n" in go("train", *tiny("--max_iters=1"))
    out = go("train", *tiny(recipe("g1_full_aux"), "--max_iters=1", "--label_share=0"))
    assert "losses: lm; here without: jepa, util, rank\n" in out
    out = go("train", *tiny(recipe("cheap_only"), "--max_iters=1"))
    assert "losses: lm; here without: jepa, util, rank\n" in out


def test_the_budget_may_fall_from_one(place):
    go("train", *tiny("--budget_fall=0.5", "--budget=0.25", "--max_iters=8"))
    budgets = [record["budget"] for record in steps_of(RUN)]
    assert budgets[0] == [1, 1] and budgets[2] == [0.625] * 2 and budgets[4] == budgets[7] == [0.25] * 2
    for record in log_of(RUN):
        if "val" in record:  # an evaluation is at the budget that was asked for
            assert record["val"]["topk"]["budget"] == [0.25, 0.25]


def test_a_learned_gate_may_have_uneven_layers_too(place):
    go("train", *tiny("--layer_spread=0.5", "--cheap_start=fitted", "--max_iters=10"))
    first, second = summary_of(RUN)["layer_order"]
    shares = {layer: round(share, 6) for layer, share in zip([1, 2], summary_of(RUN)["layer_budgets"])}
    assert shares == {first: 0.625, second: 0.375}
    assert steps_of(RUN)[0]["budget"] == pytest.approx([shares[1], shares[2]], abs=0.04)
    assert '"budget": 0.75' in go("train", *tiny("--layer_spread=0.5", "--cheap_start=fitted", "--max_iters=10",
                                                 "--eval_only", "--budget=0.75"))


def test_fitted_cheap_ffns_start_nearer_to_the_dense_model(place):
    kl = {}
    for start in ("zero", "fitted"):
        go("train", *tiny(f"--cheap_start={start}", f"--recipe={start}", "--max_iters=1"))
        kl[start] = log_of(f"out/tiny/{start}/seed0")[0]["val"]["topk"]["kl"]
    assert kl["fitted"] < 0.8 * kl["zero"]


def test_a_static_run_gives_whole_layers_the_budget(place):
    out = go("train", *tiny(recipe("static"), "--budget=0.75", "--max_iters=10"))
    summary = summary_of("out/tiny/static/seed0")
    first, second = summary["layer_order"]
    assert sorted([first, second]) == [1, 2] and f"{{{first}: 1.0, {second}: 0.5}}" in out
    assert dict(zip([1, 2], summary["layer_budgets"])) == {first: 1.0, second: 0.5}
    assert summary["val"]["topk"]["budget"] == summary["layer_budgets"]
    steps = steps_of("out/tiny/static/seed0")
    assert steps[0]["budget"] == [0.75, 0.75] and steps[1]["budget"] == summary["layer_budgets"]


# -----------------------------------------------------------------------------
# the machine

def of_machine(threads):
    return machine.Machine({"device": "cpu", "batch_size": 4, "threads": threads, "dtype": "float32"})


@pytest.mark.parametrize("load, threads, busy", [(9.0, 2, True), (0.1, 2, False), (9.0, 1, False)])
def test_a_busy_machine_is_said(load, threads, busy, monkeypatch, capsys):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    try:
        of_machine(threads)
    finally:
        torch.set_num_threads(1)
    assert ("this machine is busy (load 9.0); --threads=1 is faster" in capsys.readouterr().out) == busy


@pytest.mark.parametrize("quota, cores", [("150000 100000", 2), ("50000 100000", 1), ("max 100000", 8),
                                          (None, 8)])
def test_a_containers_quota_counts(quota, cores, monkeypatch, tmp_path):
    def from_cgroup(path, **options):
        assert path == "/sys/fs/cgroup/cpu.max"
        return open(tmp_path / "cpu.max", **options)

    if quota:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(machine, "open", from_cgroup, raising=False)
    assert machine.cores() == cores


def test_what_the_machine_does_not_have_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device='cuda' but PyTorch finds no CUDA device; use --device=cpu"):
        go("train", *tiny("--device=cuda"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="--batch_size=4 does not divide among 3 processes"):
        of_machine(1)


def check_close(one, two):
    """Two runs of 4 steps have the same records, and their numbers agree to float tolerance."""
    for a, b in zip(steps_of(one), steps_of(two), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=2e-3, abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=3e-2)  # rounding may route a token differently


def test_two_processes_give_the_losses_of_one_with_one_log(place, tmp_path):
    shutil.rmtree("out")  # the backbone trains on two processes too
    shutil.copytree(place, tmp_path / "two")
    words = tiny("--max_iters=4")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = start(*torchrun, HERE / "train.py", *words, cwd=tmp_path / "two")
    go("train", *words)
    code, out, err = finish(child)
    assert code == 0, err
    for folder in (BACKBONE, RUN):
        check_close(folder, tmp_path / "two" / folder)
        a, b = summary_of(folder)["test"], summary_of(tmp_path / "two" / folder)["test"]
        assert all(a[mode]["loss"] == pytest.approx(b[mode]["loss"], rel=1e-3) for mode in a)
    assert len(re.findall("^step 3/4", out, re.M)) == 2  # the backbone's and the run's, not twice that


@pytest.mark.parametrize("name", ["g3_full_aux", "best"])
def test_accumulation_gives_the_losses_of_one_batch(name, place):
    words = [recipe(name), "--label_share=1.0", "--max_iters=4"]
    go("train", *tiny(*words, "--out_dir=out/one"))
    go("train", *tiny(*words, "--batch_size=2", "--gradient_accumulation_steps=2", "--out_dir=out/two"))
    check_close("out/one", "out/two")


RECIPES = sorted(path.stem for path in (HERE / "config").glob("*.py") if "recipe =" in path.read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name, place):
    go("train", *tiny(recipe(name), "--max_iters=2", "--eval_interval=1", "--out_dir=out/run"))
    losses = [record["losses"] for record in steps_of("out/run")]
    assert len(losses) == 2 and all(math.isfinite(value) for record in losses for value in record.values())
    assert all(math.isfinite(result["loss"]) for result in summary_of("out/run")["test"].values())
