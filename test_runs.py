"""Runs: the same numbers every time, nothing lost, nothing overwritten, nothing half-written."""
import contextlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

import runs
import train
from configurator import ConfigError, configure
from conftest import (HERE, TINY, checkpoint_of, finish, go, log_of, losses_of, make_documents, recipe, same, same_run, snapshot, start,
                      summary_of, tiny, write_jsonl)

RECIPES = sorted(p.stem for p in (HERE / "config").glob("*.py"))
CONTROLLERS = [n for n in RECIPES if (c := configure(train.DEFAULTS, [recipe(n)]))["recipe"] == n and c["mode"] != "dense"]
RUN = "out/tiny/g3_full_aux/seed0"


class Stopped(Exception):
    """A run is over at once, as after a crash."""


def stop(*args, **options):
    raise Stopped


@contextlib.contextmanager
def stop_at(step):
    """Within this, training raises Stopped in place of its step `step`."""
    real = train.train_step

    def train_step(*args, **options):
        return (stop if args[4] == step else real)(*args, **options)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "train_step", train_step)
        with pytest.raises(Stopped):
            yield


# -----------------------------------------------------------------------------
# resume

@pytest.mark.parametrize("stops", [[0], [1], [5], [3, 7, 7, 9]], ids=str)
@pytest.mark.parametrize("name", ["backbone", "g3_full_aux", "static"])
def test_stopped_and_resumed_equals_undisturbed(name, stops, place):
    every = 1 if name == "static" else 3
    words = tiny(recipe(name), "--max_iters=10", f"--eval_interval={every}")
    go("train", *words, "--out_dir=out/calm")
    for step in stops:
        with stop_at(step):
            go("train", *words, "--out_dir=out/stopped")
        assert not Path("out/stopped/summary.json").exists()
    out = go("train", *words, "--out_dir=out/stopped")
    assert f"resuming out/stopped at step {stops[-1] // every * every}" in out
    assert same_run("out/calm", "out/stopped")
    calm, stopped = (summary_of(f"out/{n}") for n in ("calm", "stopped"))
    assert {k: v for k, v in calm.items() if k != "seconds"} == {k: v for k, v in stopped.items() if k != "seconds"}


def test_a_resume_repeats_no_step_before_the_checkpoint(place):
    with stop_at(5):
        go("train", *tiny())
    seen, real = [], train.train_step
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "train_step", lambda *a, **k: seen.append(a[4]) or real(*a, **k))
        go("train", *tiny())
    assert seen == [4, 5]


# -----------------------------------------------------------------------------
# SIGKILL

# Where a run dies: Python that a child process runs first. die_at(owner, name, n) kills at the n-th call of owner.name.
KILLS = {
    "during a step": "die_at(torch.nn.utils, 'clip_grad_norm_', 6)",
    "before the first checkpoint": "die_at(train, 'write_whole', 1)",
    "half a checkpoint written": "die_at(torch, 'save', 3, half)",
    "a checkpoint written but not renamed": "die_at(os, 'replace', 3, when=lambda a, b: str(b).endswith('ckpt.pt'))",
    "during an evaluation": "die_at(train, 'evaluate', 4)",
    "an evaluation logged but no checkpoint": "die_at(train, 'write_whole', 3)",
    "half a log line written": "train.open = lambda *a: Halving(open(*a))",
    "before the summary": "die_at(os, 'replace', 1, when=lambda a, b: str(b).endswith('summary.json'))",
    "while its backbone trains": "shutil.rmtree('out/tiny/backbone'); die_at(torch.nn.utils, 'clip_grad_norm_', 3)",
}
CHILD = """
import json, os, shutil, signal, sys, torch, train
from configurator import exit_on_error

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def half(value, path):
    save(value, path)
    os.truncate(path, os.path.getsize(path) // 2)
save = torch.save

def die_at(owner, name, n, first=None, when=lambda *a: True):
    real, calls = getattr(owner, name), []
    def wrapped(*args, **options):
        if when(*args):
            calls.append(1)
            if len(calls) == n:
                first and first(*args)
                die()
        return real(*args, **options)
    setattr(owner, name, wrapped)

class Halving:
    lines = 0
    def __init__(self, file):
        self.file = file
    def __getattr__(self, name):
        return getattr(self.file, name)
    def write(self, line):
        Halving.lines += 1
        if Halving.lines == 6:
            self.file.write(line[:len(line) // 2])
            self.file.flush()
            die()
        self.file.write(line)

for folder, kill in json.loads(sys.argv.pop(1)):
    pid = os.fork()  # of a process that has imported torch and done nothing with it
    if pid == 0:
        os.chdir(folder)
        exec(kill)
        exit_on_error(train.main)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, kill
"""


@pytest.fixture(scope="module")
def killed(templates, tmp_path_factory):
    """{where: a folder in which a run was killed there}, and under '' one with an undisturbed run."""
    folders = {where: tmp_path_factory.mktemp("killed") / "place" for where in ["", *KILLS]}
    for folder in folders.values():
        shutil.copytree(templates / "place", folder)
    child = start("-c", CHILD, json.dumps([(str(folders[where]), kill) for where, kill in KILLS.items()]), *tiny())
    with contextlib.chdir(folders[""]):
        go("train", *tiny())
    code, out, err = finish(child)
    assert code == 0, out + err
    return folders


@pytest.mark.parametrize("where", KILLS)
def test_a_killed_run_is_finished_by_the_same_command_as_if_nothing_had_happened(where, killed, monkeypatch):
    monkeypatch.chdir(killed[where])
    assert not Path(RUN, "summary.json").exists()
    if Path(RUN, "ckpt.pt").exists():
        checkpoint_of(RUN)  # whole
    go("train", *tiny())
    assert same_run(RUN, killed[""] / RUN)
    assert same(checkpoint_of("out/tiny/backbone/seed0")["model"], checkpoint_of(killed[""] / "out/tiny/backbone/seed0")["model"])
    assert {p.name for p in Path(RUN).iterdir()} - {"lock"} == {"ckpt.pt", "config.json", "log.jsonl", "summary.json"}


# -----------------------------------------------------------------------------
# nothing overwritten

def test_a_finished_run_is_not_touched_by_its_command(done):
    before = snapshot(times=True)
    assert "finished already" in go("train", *tiny())
    assert snapshot(times=True) == before


def test_overwrite_runs_again_to_the_same_numbers(done):
    before, log = snapshot(RUN, times=True), log_of(RUN)
    go("train", *tiny("--overwrite"))
    assert log_of(RUN) == log
    after = snapshot(RUN, times=True)
    assert after.keys() == before.keys() and all(after[k] != before[k] for k in before)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("word", ["--gate_lr=0.5", "--lambda_rank=0.25", "--batch_size=8", "--eval_interval=3", "--threads=2", "--n_embd=32",
                                  "--backbone_iters=5", "--oracle=on_policy"])
def test_another_config_in_the_same_place_is_refused_by_key_and_changes_nothing(word, finished, done):
    if not finished:
        os.remove(f"{RUN}/summary.json")
    before, threads = snapshot(times=True), torch.get_num_threads()
    try:
        with pytest.raises(ConfigError, match=rf"{word[2:].split('=')[0]}\b.*--overwrite"):
            go("train", *tiny(word))
    finally:
        torch.set_num_threads(threads)
    assert snapshot(times=True) == before


def test_another_text_in_the_same_place_is_refused(done):
    write_jsonl("other.jsonl", make_documents(9))
    go("prepare", "--source=other.jsonl", "--name=tiny", "--tokenizer=bytes", "--overwrite")
    before = snapshot(RUN, times=True)
    with pytest.raises(ConfigError, match="data|identity"):
        go("train", *tiny())
    assert snapshot(RUN, times=True) == before


def test_a_second_process_in_one_folder_is_refused(place, monkeypatch):
    words = tiny("--max_iters=1000000")
    monkeypatch.setattr(train, "train_step", stop)  # a second run that is let in ends here
    first = start(HERE / "train.py", *words)
    try:
        for _ in range(1200):
            if Path(RUN, "log.jsonl").exists() or first.poll() is not None:
                break
            time.sleep(0.1)
        with pytest.raises(ConfigError, match=f"{RUN}.*(wait|--seed|--out_dir)"):
            go("train", *words)
        with pytest.raises(ConfigError, match=f"{RUN}.*(wait|--seed|--out_dir)"):
            go("train", *words, "--overwrite")
        assert first.poll() is None and Path(RUN, "config.json").exists()
    finally:
        first.kill()
        finish(first)
    with pytest.raises(Stopped):  # its lock died with it
        go("train", *words)


# -----------------------------------------------------------------------------
# a full disk

@pytest.mark.parametrize("error, text", [(OSError, "No space left on device"), (RuntimeError, "PytorchStreamWriter failed writing file")])
def test_a_disk_full_at_a_checkpoint_keeps_the_previous_one(error, text, place, monkeypatch):
    go("train", *tiny("--out_dir=out/calm"))
    real = torch.save

    def full(value, path):
        real(value, path)
        if value["step"] == 4:
            os.truncate(path, os.path.getsize(path) // 2)
            raise error(text)

    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(ConfigError, match=r"ckpt\.pt.*(intact|kept).*space"):
            go("train", *tiny())
    assert checkpoint_of(RUN)["step"] == 2
    assert not list(Path(RUN).glob("*.part"))
    go("train", *tiny())
    assert same_run(RUN, "out/calm")


def test_a_disk_full_at_a_log_line_is_one_clear_error_and_loses_nothing(place, monkeypatch):
    go("train", *tiny("--out_dir=out/calm"))

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 2000

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, line):
            self.left -= len(line)
            if self.left < 0:
                self.file.write(line[:10])
                raise OSError(28, "No space left on device")
            return self.file.write(line)

    with monkeypatch.context() as m:
        m.setattr(train, "open", lambda path, mode="r", *a: Full(open(path, mode, *a)) if "a" in mode else open(path, mode, *a), raising=False)
        with pytest.raises(ConfigError, match=r"log\.jsonl.*No space left"):
            go("train", *tiny())
    go("train", *tiny())
    assert same_run(RUN, "out/calm")


# -----------------------------------------------------------------------------
# the same numbers

def test_a_seed_may_be_as_large_as_63_bits(place):
    go("train", *tiny(f"--seed={2 ** 63 - 1}", "--max_iters=1", "--out_dir=out/large"))
    assert summary_of("out/large")["steps"] == 1


@pytest.mark.parametrize("name", ["g3_full_aux", "g1_on_policy", "random", "best"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(name, place):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(ord(out))  # the state that a run finds does not matter
        go("train", *tiny(recipe(name), f"--seed={seed}", f"--out_dir=out/{out}"))
    assert same_run("out/a", "out/b")
    assert not set(losses_of("out/a").values()) & set(losses_of("out/c").values())
    a, c = (checkpoint_of(f"out/{x}")["model"] for x in "ac")
    assert not any(torch.equal(a[k], c[k]) for k in a if k.endswith("cheap.c_fc.weight"))


def test_how_often_a_run_evaluates_and_logs_changes_no_number(place):
    go("train", *tiny("--out_dir=out/a", "--eval_interval=2", "--log_interval=1"))
    go("train", *tiny("--out_dir=out/b", "--eval_interval=3", "--log_interval=2", "--eval_iters=1"))
    a, b = (log_of(f"out/{x}") for x in "ab")
    often, rarely = ({r["step"]: r for r in log if "lm_loss" in r} for log in (a, b))
    assert set(rarely) == {0, 2, 4} and all(often[s] == rarely[s] for s in rarely)
    assert same(checkpoint_of("out/a")["optimizers"], checkpoint_of("out/b")["optimizers"])
    a, b = (checkpoint_of(f"out/{x}")["model"] for x in "ab")
    assert same(a, b)
    assert summary_of("out/a")["test_loss"] == summary_of("out/b")["test_loss"]


def test_log_interval_may_change_at_a_resume(place):
    with stop_at(4):
        go("train", *tiny())
    go("train", *tiny("--log_interval=5"))
    go("train", *tiny("--out_dir=out/calm"))
    assert same(checkpoint_of(RUN)["model"], checkpoint_of("out/calm")["model"])


def test_the_number_of_threads_is_recorded(place):
    go("train", *tiny("--max_iters=1"))
    assert json.loads(Path(RUN, "config.json").read_text())["threads"] == 1


@pytest.mark.parametrize("name", ["g3_full_aux", "g1_on_policy"])
def test_accumulation_gives_the_losses_of_one_batch(name, place):
    words = [recipe(name), "--label_share=0.5", "--max_iters=4", "--backbone=out/tiny/backbone/seed0"]
    go("train", *tiny(*words, "--out_dir=out/one"))
    go("train", *tiny(*words, "--batch_size=2", "--gradient_accumulation_steps=2", "--out_dir=out/two"))
    check_close("out/one", "out/two")


def check_close(a, b, tolerance=2e-4):
    """Two logs have the same records, and their numbers agree to float tolerance."""
    def flat(x):
        if isinstance(x, dict):
            return [v for k in sorted(x) for v in flat(x[k])]
        return [v for i in x for v in flat(i)] if isinstance(x, list) else [float(x)]

    a, b = ([r for r in log_of(x) if "lm_loss" in r] for x in (a, b))
    assert [r.keys() for r in a] == [r.keys() for r in b] and len(a) > 2
    for x, y in zip(a, b):
        assert flat(x) == pytest.approx(flat(y), rel=tolerance, abs=tolerance)


def test_a_share_of_labels_that_slices_cannot_share_evenly_is_exact_or_refused(place):
    words = ["--label_share=0.25", "--max_iters=4", "--backbone=out/tiny/backbone/seed0"]
    go("train", *tiny(*words, "--out_dir=out/one"))
    try:
        go("train", *tiny(*words, "--batch_size=1", "--gradient_accumulation_steps=4", "--out_dir=out/four"))
    except ConfigError as error:
        assert "label_share" in str(error)
    else:
        check_close("out/one", "out/four")


# -----------------------------------------------------------------------------
# several processes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_processes_give_the_losses_of_one_with_one_log_and_one_checkpoint(templates, tmp_path, monkeypatch):
    for folder in ("one", "two"):
        shutil.copytree(templates / "place" / "data", tmp_path / folder / "data")  # no backbone: it trains on two processes too
    words = tiny("--max_iters=4")
    child = start(*TORCHRUN, HERE / "train.py", *words, cwd=tmp_path / "two")
    monkeypatch.chdir(tmp_path / "one")
    go("train", *words)
    code, out, err = finish(child)
    assert code == 0, err
    for run in ("out/tiny/backbone/seed0", RUN):
        check_close(run, tmp_path / "two" / run)
    files = lambda folder: {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "lock"}
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert [r["step"] for r in log_of(tmp_path / "two" / RUN)] == [r["step"] for r in log_of(RUN)]
    a, b = (checkpoint_of(f / RUN)["model"] for f in (tmp_path / "one", tmp_path / "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a)
    assert len(re.findall("^step 3/4", out, re.M)) == 2  # the backbone's and the run's, not twice that
    assert json.loads((tmp_path / "two" / RUN / "config.json").read_text())["processes"] == 2


def test_when_one_process_dies_the_others_end_and_the_checkpoint_is_whole(place):
    Path("dying.py").write_text("import os, signal, train\nfrom configurator import exit_on_error\nreal = train.train_step\n"
                                "def train_step(*args, **options):\n"
                                "    if args[4] == 3 and os.environ['RANK'] == '1':\n"
                                "        os.kill(os.getpid(), signal.SIGKILL)\n"
                                "    return real(*args, **options)\n"
                                "train.train_step = train_step\nexit_on_error(train.main)\n")
    child = start(*TORCHRUN, "dying.py", *tiny())
    code, out, err = finish(child, 120)
    assert code != 0
    assert checkpoint_of(RUN)["step"] == 2 and not Path(RUN, "summary.json").exists()
    runs.open_run(RUN, {}, False)  # nobody holds the folder any more


# -----------------------------------------------------------------------------
# the frozen backbone

def test_the_backbone_is_trained_once_and_reused(place):
    before = snapshot("out/tiny/backbone", times=True)
    for words in (tiny(), tiny(recipe("g1_full_aux"), "--seed=3")):
        assert "training one" not in go("train", *words)
    assert snapshot("out/tiny/backbone", times=True) == before
    a, b = summary_of(RUN), summary_of("out/tiny/g1_full_aux/seed3")
    assert a["backbone"] == b["backbone"] and a["identity"] == b["identity"] == summary_of("out/tiny/backbone/seed0")["identity"]


@pytest.mark.parametrize("change", ["--backbone_iters=5", "--backbone_lr=1e-4", "--backbone_seed=1", "--n_embd=32", "--dataset=other"])
def test_another_config_or_text_gets_another_backbone_and_leaves_the_first(change, done):
    write_jsonl("other.jsonl", make_documents(9))
    go("prepare", "--source=other.jsonl", "--name=other", "--tokenizer=bytes")
    before = snapshot("out/tiny/backbone", times=True)
    go("train", *tiny(change, "--max_iters=1", "--out_dir=out/other"))
    old, new = summary_of(RUN), summary_of("out/other")
    assert new["identity"] != old["identity"] and new["backbone"]["weights"] != old["backbone"]["weights"]
    assert new["backbone"]["path"] != old["backbone"]["path"]
    assert new["identity"] in new["backbone"]["path"] or change == "--backbone_seed=1"  # another seed has its own folder anyway
    after = snapshot("out/tiny/backbone", times=True)
    assert {k: after[k] for k in before if before[k] != "folder"} == {k: v for k, v in before.items() if v != "folder"}
    go("train", *tiny(change, "--max_iters=1", "--seed=1", "--out_dir=out/again"))
    assert summary_of("out/again")["backbone"] == new["backbone"]


@pytest.mark.parametrize("words", [["--batch_size=2", "--gradient_accumulation_steps=2"], ["--grad_clip=0.5"], ["--beta2=0.99"],
                                   ["--min_lr_ratio=0.5"], ["--learning_rate=0.01"], ["--weight_decay=0"]], ids=str)
def test_how_a_gate_is_optimised_does_not_ask_for_another_backbone(words, place):
    go("train", *tiny(*words, "--max_iters=1"))
    assert summary_of(RUN)["backbone"]["path"] == "out/tiny/backbone/seed0"


@pytest.mark.parametrize("use", ["resume", "eval_only", "sample"])
def test_a_gate_refuses_a_backbone_that_has_changed(use, done):
    os.remove(f"{RUN}/summary.json")
    path = "out/tiny/backbone/seed0/ckpt.pt"
    ckpt = torch.load(path, weights_only=True)
    ckpt["model"]["h.1.mlp.c_fc.weight"][0, 0] += 1e-3
    torch.save(ckpt, path)
    before = snapshot(times=True)
    with pytest.raises(ConfigError, match="another backbone"):
        go("sample", RUN, "--max_new_tokens=1") if use == "sample" else go("train", *tiny(*(["--eval_only"] if use == "eval_only" else [])))
    assert snapshot(times=True) == before


@pytest.mark.parametrize("name", ["g3_full_aux", "best", "full_adapter", "cheap_only", "static"])
def test_only_the_controllers_train_and_the_backbone_ends_as_it_began(name, place, monkeypatch):
    held = []

    def make_optimizers(model, config):
        held.append((model, {n: p.detach().clone() for n, p in model.named_parameters()}, optimizers := real(model, config)))
        return optimizers

    real = train.make_optimizers
    monkeypatch.setattr(train, "make_optimizers", make_optimizers)
    go("train", *tiny(recipe(name)))
    [(model, start_weights, optimizers)] = held
    names = {id(p): n for n, p in model.named_parameters()}
    optimized = {names[id(p)] for o in optimizers for g in o.param_groups for p in g["params"]}
    controllers = {n for n in start_weights if re.match(r"h\.[12]\.(cheap|gate)\.", n)}
    if name in ("full_adapter", "cheap_only"):
        controllers = {n for n in controllers if ".cheap." in n}
    assert optimized == controllers and len(controllers) >= 8
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start_weights[n])}
    assert moved <= controllers and any(".cheap." in n for n in moved)
    dense = checkpoint_of("out/tiny/backbone/seed0")["model"]
    assert all(torch.equal(p, dense[n]) for n, p in model.named_parameters() if ".cheap." not in n and ".gate." not in n)
    summary = summary_of(f"out/tiny/{name}/seed0")
    assert summary["frozen_hash"]["before"] == summary["frozen_hash"]["after"]
    assert summary["backbone"]["weights"] == runs.weights_hash({n: dense[n] for n in model.backbone()})
    assert summary["trained_parameters"] == sum(start_weights[n].numel() for n in controllers)


def test_a_frozen_weight_that_moves_stops_the_run_before_a_summary(place, monkeypatch):
    real = train.train_step

    def train_step(model, *args, **options):
        with torch.no_grad():
            model.h[0].mlp.c_fc.bias[0] += 1e-4
        return real(model, *args, **options)

    monkeypatch.setattr(train, "train_step", train_step)
    with pytest.raises((AssertionError, ConfigError), match="frozen"):
        go("train", *tiny())
    assert not Path(RUN, "summary.json").exists()


# -----------------------------------------------------------------------------
# a loss that is no number

def poison(monkeypatch, at, what):
    """Make `what` (a loss, or the weights after the step) not finite at step `at`."""
    real_step, real_losses, now = train.train_step, train.step_losses, []

    def train_step(model, *args, **options):
        now[:] = [args[3]]
        values = real_step(model, *args, **options)
        if what == "weights" and now == [at]:
            with torch.no_grad():
                model.h[1].cheap.c_proj.weight.fill_(math.nan)
        return values

    def step_losses(*args, **options):
        losses, routes = real_losses(*args, **options)
        if what in losses and now == [at]:
            losses[what] = losses[what] * math.nan
        return losses, routes

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "step_losses", step_losses)


def check_last_good(step):
    ckpt = checkpoint_of(RUN)
    assert ckpt["step"] <= step and all(v.isfinite().all() for k, v in ckpt["model"].items() if "threshold" not in k)
    assert not Path(RUN, "summary.json").exists()


@pytest.mark.parametrize("log_interval", [1, 100])
@pytest.mark.parametrize("name", ["lm", "util", "rank", "jepa"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_loss(name, log_interval, place, monkeypatch):
    poison(monkeypatch, 3, name)
    with pytest.raises(ConfigError, match=rf"\b{name}(_loss)?\b.*\bstep 3\b.*last good checkpoint"):
        go("train", *tiny(f"--log_interval={log_interval}"))
    check_last_good(2)


@pytest.mark.parametrize("step", [1, 5])
def test_weights_that_break_right_before_an_evaluation_never_reach_a_checkpoint(step, place, monkeypatch):
    poison(monkeypatch, step, "weights")
    with pytest.raises(ConfigError, match="last good checkpoint"):
        go("train", *tiny())
    check_last_good(step - 1)


def test_a_learning_rate_that_explodes_ends_with_exit_code_2_and_one_line(place):
    code, out, err = finish(start(HERE / "train.py", *tiny("--learning_rate=1e30", "--gate_lr=1e30", "--max_iters=20", "--log_interval=100")))
    assert code == 2 and err.count("\n") == 1 and "step" in err and "loss" in err
    check_last_good(20)


# -----------------------------------------------------------------------------
# what comes out

@pytest.mark.parametrize("name", RECIPES)
def test_every_config_resolves(name):
    config = train.validate(configure(train.DEFAULTS, [recipe(name)]))
    assert name in (config["recipe"], config["scale"])


@pytest.mark.parametrize("name", [*CONTROLLERS, "backbone", "backbone_long"])
def test_every_recipe_trains(name, place):
    go("train", *tiny(recipe(name), "--max_iters=2", "--eval_interval=1", "--out_dir=out/run"))
    log, summary = log_of("out/run"), summary_of("out/run")
    assert [r["step"] for r in log if "lm_loss" in r] == [0, 1] and [r["step"] for r in log if "val_loss" in r] == [0, 1, 2]
    losses = [r[k] for r in log for k in ("lm_loss", "util", "rank", "jepa") if k in r] + [v for r in log for v in r.get("val_loss", {}).values()]
    assert all(map(math.isfinite, losses)) and all(math.isfinite(v) for v in summary["val_loss"].values())
    config = configure(train.DEFAULTS, [recipe(name)])
    learned = config["mode"] == "topk" and config["gate"] in ("g1", "g3")
    assert ("util" in log[1]) == ("rank" in log[1]) == (learned and config["lambda_util"] > 0)
    assert ("jepa" in log[1]) == (config["mode"] == "topk" and config["gate"] == "g3" and config["lambda_jepa"] > 0)
    if config["mode"] == "topk":
        # 16 tokens a row: rounding moves a layer's share by 1/32 at most
        assert sum(summary["realised_budget"]["topk"]) / 2 == pytest.approx(config["budget"], abs=1 / 32)


def test_every_recipe_of_controllers_is_here():
    assert {"g1_full_aux", "g3_full_aux", "g1_no_utilrank", "g3_no_utilrank", "static", "random", "cheap_only", "full_adapter", "best"} <= set(CONTROLLERS)


def test_eval_only_prints_a_budgets_losses_as_json_and_changes_nothing(done):
    before = snapshot(times=True)
    half = json.loads(go("train", *tiny("--eval_only")).splitlines()[-1])
    quarter = json.loads(go("train", *tiny("--eval_only", "--budget=0.25")).splitlines()[-1])
    assert snapshot(times=True) == before
    assert half["val_loss"] == pytest.approx(summary_of(RUN)["val_loss"])
    assert quarter["budget"] == 0.25 and set(quarter["val_loss"]) == {"topk", "threshold"} and quarter["val_loss"] != half["val_loss"]
    assert quarter["realised_budget"]["topk"] == [0.25, 0.25]
    assert all(abs(b - 0.25) < 0.15 for b in quarter["realised_budget"]["threshold"])


@pytest.mark.parametrize("budget, share", [(0, 0), (1, 1)])
def test_eval_only_at_the_ends_of_the_budget(budget, share, done):
    result = json.loads(go("train", *tiny("--eval_only", f"--budget={budget}")).splitlines()[-1])
    assert result["realised_budget"] == {"topk": [share] * 2, "threshold": [share] * 2}
    if budget == 1:
        assert result["val_loss"]["threshold"] == pytest.approx(summary_of(RUN)["dense_val_loss"], abs=1e-5)


def test_eval_only_of_a_backbone_prints_its_loss(done):
    result = json.loads(go("train", *tiny(recipe("backbone"), "--eval_only")).splitlines()[-1])
    assert result["val_loss"]["full"] == pytest.approx(summary_of(RUN)["dense_val_loss"])


def test_a_summary_has_what_a_comparison_needs(done):
    summary = summary_of(RUN)
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    assert summary["data"] == {s: v["sha256"] for s, v in meta["splits"].items()}
    assert set(summary["val_loss"]) == set(summary["test_loss"]) == set(summary["realised_budget"]) == {"topk", "threshold"}
    curve = [r["val_loss"]["threshold"] for r in log_of(RUN) if "val_loss" in r]
    assert summary["best_val_loss"]["threshold"] == min(curve)
    assert summary["average_val_loss"]["threshold"] == pytest.approx(sum(curve[1:]) / (len(curve) - 1))
    assert summary["steps"] == 6 and summary["seconds"] > 0 and summary["flops"]["forward_proxy"] > 1


def test_gap_closed_is_measured_against_both_references(done):
    for name in ("cheap_only", "full_adapter"):
        assert isinstance(summary_of(RUN)["gap_closed"], str)
        go("train", *tiny(recipe(name)))
    go("train", *tiny("--overwrite"))
    floor, top = (summary_of(f"out/tiny/{n}/seed0")["val_loss"] for n in ("cheap_only", "full_adapter"))
    loss = summary_of(RUN)["val_loss"]["threshold"]
    assert summary_of(RUN)["gap_closed"] == pytest.approx((floor["cheap"] - loss) / (floor["cheap"] - top["adapter"]))


def unlabelled(text):
    """The lines that print a topk loss without saying that it is not causal."""
    return [line for line in text.splitlines() if "loss" in line and re.search(r"topk.*\d|\d.*topk", line) and not re.search("not.causal|non.causal", line)]


def test_topk_losses_are_labelled_not_causal_wherever_they_are_printed(done):
    assert unlabelled('val_loss: {"topk": 1.5}')
    out = go("train", *tiny("--overwrite")) + go("train", *tiny("--eval_only"))
    assert "topk" in out and not unlabelled(out)


# -----------------------------------------------------------------------------
# sample.py and study.py

def test_sample_prints_text_with_its_routing_and_writes_html_and_png(done):
    out = go("sample", RUN, "--prompt=the naïve 木", "--max_new_tokens=20", "--view=a.html")
    text, digits = out.split("\n")[:2]
    assert text.startswith("the na") and len(digits) == len(text) and set(digits) <= set("012")
    page = Path("a.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.count('class="t') == 20 + len("the naïve 木".encode())
    before = snapshot(RUN, times=True)
    go("sample", RUN, "--prompt=the", "--max_new_tokens=0", "--view=a.png")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert snapshot(RUN, times=True) == before


@pytest.mark.parametrize("words", [["--mode=full"], ["--mode=cheap"], ["--budget=0"], ["--budget=1"], ["--temperature=0"], ["--max_new_tokens=40"]], ids=str)
def test_sample_repeats_itself(words, done):
    words = [RUN, "--prompt=the", *words, *([] if "new" in words[0] else ["--max_new_tokens=10"])]
    assert go("sample", *words) == go("sample", *words) != ""


def test_sample_shows_every_token_full_at_budget_1_and_none_at_0(done):
    for budget, digit in ((1, "2"), (0, "0")):
        out = go("sample", RUN, "--prompt=the", "--max_new_tokens=8", f"--budget={budget}")
        assert f"full at {digit}.00 of 2" in out


def test_sample_of_a_backbone(done):
    assert go("sample", "out/tiny/backbone/seed0", "--prompt=the", "--max_new_tokens=5").startswith("the")


def test_a_study_reports_resumes_and_equals_runs_by_hand(done):
    words = [f"--{k}={v}" for k, v in {**TINY, "max_iters": 4}.items()]
    for arm in ("cheap_only", "full_adapter", "g1_full_aux"):
        for seed in (0, 1):
            go("train", recipe(arm), *words, "--backbone=backbone", f"--seed={seed}", f"--out_dir=out/tiny/study/{arm}/seed{seed}")
    go("train", recipe("g3_full_aux"), *words, "--seed=1", "--out_dir=out/by_hand")
    finished = snapshot("out/tiny/study", times=True)
    study = [*words, "--backbone=backbone", "--arms=cheap_only,full_adapter,g1_full_aux,g3_full_aux", "--seeds=0,1"]
    code, out, err = finish(start(HERE / "study.py", *study))
    assert code == 0, err
    folder = Path("out/tiny/study")
    assert {k: v for k, v in snapshot(folder, times=True).items() if k in finished} == finished  # what was finished was skipped
    assert same_run(folder / "g3_full_aux" / "seed1", "out/by_hand")

    text, results = (folder / "report.md").read_text(), json.loads((folder / "results.json").read_text())
    pictures = re.findall(r"!\[.*?\]\((.*?\.png)\)", text)
    assert len(pictures) >= 5 and all((folder / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    assert set(results["arms"]) == {"cheap_only", "full_adapter", "g1_full_aux", "g3_full_aux"}
    for seed in ("0", "1"):
        floor, loss, top = (results["arms"][a][seed]["test_loss"] for a in ("cheap_only", "g3_full_aux", "full_adapter"))
        assert results["arms"]["g3_full_aux"][seed]["gap_closed"] == pytest.approx((floor - loss) / (floor - top))
        assert f"{loss:.4f}" in text  # every seed is shown
    [c1] = [c for c in results["contrasts"] if (c["claim"], c["metric"]) == ("C1", "average_loss")]
    assert c1["differences"] == pytest.approx([a - b for a, b in zip(c1["values_a"], c1["values_b"])]) and len(c1["differences"]) == 2
    assert all(f"**{c}**" in text for c in ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"))
    assert all(re.search("not.causal", line) for line in text.splitlines() if "topk" in line)

    before = {k: v for k, v in snapshot(folder, times=True).items() if "seed" in k}
    assert ", 0 to do" in go("study", *study)
    assert {k: v for k, v in snapshot(folder, times=True).items() if "seed" in k} == before


def test_the_quickstart_makes_text_backbone_and_gate_and_shows_the_routing(quickstart):
    folder, code, out, err = quickstart
    assert code == 0, err
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_dir()} == {
        "data", "data/stdlib", "out", "out/tiny", "out/tiny/backbone", "out/tiny/backbone/seed0", "out/tiny/g3_full_aux", RUN}
    summary = summary_of(folder / RUN)
    assert summary["steps"] == 4 and all(map(math.isfinite, summary["val_loss"].values()))
    assert re.search(r"^[0-5]{100}$", out, re.M)  # one digit under each token: of 5 layers, how many ran full
    assert not unlabelled(out)
