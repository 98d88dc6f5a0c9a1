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

import metrics
import runs.run
import train
from configurator import ConfigError, configure, exit_on_error
from conftest import (HERE, checkpoint_of, config_of, finish, go, log_of, losses_of, make_documents, recipe,
                      same, same_run, snapshot, start, steps_of, summary_of, tiny, write_jsonl)
from gates import Context, active_losses
from prepare import eval_batch
from runs.files import weights_hash
from runs.folder import claim
from runs.options import validate

DEFAULTS = train.configure_run([])[1]
RECIPES = sorted(p.stem for p in (HERE / "config").glob("*.py"))
RUN, BACKBONE = "out/tiny/g3_full_aux/seed0", "out/tiny/backbone/seed0"


def resolved(name):
    return configure(DEFAULTS, [recipe(name)])


def trains_controllers(name):
    config = resolved(name)
    return config["recipe"] == name and config["mode"] != "full"


CONTROLLERS = [name for name in RECIPES if trains_controllers(name)]


class Stopped(Exception):
    """A run is over at once, as after a crash."""


@contextlib.contextmanager
def stop_at(step):
    """Within this, training raises Stopped in place of its step `step`."""
    real = train.get_batch

    def get_batch(data, config, now, micro, machine):
        if now == step:
            raise Stopped
        return real(data, config, now, micro, machine)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "get_batch", get_batch)
        with pytest.raises(Stopped):
            yield


def train_again(*words):
    """Train -> (what was printed, the steps that were trained)."""
    steps, real = [], train.get_batch

    def get_batch(data, config, step, micro, machine):
        steps.append(step)
        return real(data, config, step, micro, machine)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "get_batch", get_batch)
        return go("train", *words), steps


def without_seconds(summary):
    return {key: value for key, value in summary.items() if key not in ("seconds", "digest")}


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
    out, steps = train_again(*words, "--out_dir=out/stopped")
    last = stops[-1] // every * every  # the last checkpoint; there is none at step 0
    assert ("resuming out/stopped at step" in out) == (last > 0)
    assert steps == list(range(last, 10))
    assert same_run("out/calm", "out/stopped")
    calm, stopped = summary_of("out/calm"), summary_of("out/stopped")
    assert without_seconds(calm) == without_seconds(stopped)


@pytest.mark.parametrize("changed", [["--threads=2"], ["--log_interval=5"], ["--keep_checkpoints"]], ids=str)
def test_what_changes_no_number_may_change_at_a_resume(changed, place):
    go("train", *tiny("--out_dir=out/calm"))
    threads = torch.get_num_threads()
    with stop_at(4):
        go("train", *tiny())
    try:
        out, steps = train_again(*tiny(*changed))
    finally:
        torch.set_num_threads(threads)
    assert steps == [4, 5] and Path(RUN, "summary.json").exists()
    a, b = losses_of(RUN), losses_of("out/calm")
    assert all(b[step] == pytest.approx(a[step], rel=1e-4) for step in a)
    if changed == ["--threads=2"]:
        assert "the last bits" in out and "1 threads" in out and "2 threads" in out
        assert "1 threads" in summary_of(RUN)["machine"] and "2 threads" in summary_of(RUN)["machine"]
    else:
        assert same(checkpoint_of(RUN)["model"], checkpoint_of("out/calm")["model"])
        assert "the last bits" not in out


def test_a_backbone_interrupted_under_one_recipe_is_finished_under_another(place):
    os.rename("out/tiny/backbone", "out/calm")
    with stop_at(2):  # of the backbone
        go("train", *tiny(recipe("g3_full_aux")))
    assert Path(BACKBONE, "log.jsonl").stat().st_size and not Path(RUN).exists()
    with stop_at(3):  # by its own command, with more evaluations
        go("train", *tiny(recipe("backbone"), "--warmup_iters=50", "--max_iters=4", "--log_interval=2"))
    assert checkpoint_of(BACKBONE)["step"] == 2 and not Path(BACKBONE, "summary.json").exists()
    words = [recipe("g1_full_aux"), "--seed=3", "--gate_lr=0.01", "--log_interval=5", "--eval_interval=3",
             "--final_eval_iters=4", "--keep_checkpoints", "--batch_size=2", "--lambda_rank=0.5"]
    assert f"resuming {BACKBONE} at step 2" in go("train", *tiny(*words))
    calm = checkpoint_of("out/calm/seed0")
    assert same(checkpoint_of(BACKBONE)["model"], calm["model"])
    assert summary_of("out/tiny/g1_full_aux/seed3")["identity"] == calm["identity"]
    before = snapshot(BACKBONE, times=True)
    go("train", *tiny(recipe("static"), "--max_iters=1"))
    assert snapshot(BACKBONE, times=True) == before


# -----------------------------------------------------------------------------
# SIGKILL

# Where a run dies: Python that a child process runs first. die_at(owner, name, n) kills at the n-th call of
# owner.name.
KILLS = {
    "during a step": "die_at(torch.nn.utils, 'clip_grad_norm_', 6)",
    "before the first checkpoint": "die_at(runs.run, 'write_whole', 1)",
    "half a checkpoint written": "die_at(torch, 'save', 2, half)",
    "a checkpoint written but not renamed":
        "die_at(os, 'replace', 2, when=lambda a, b: b.endswith('ckpt.pt'))",
    "during an evaluation": "die_at(metrics, 'evaluate', 4)",
    "an evaluation logged but no checkpoint": "die_at(runs.run, 'write_whole', 2)",
    "half a log line written": "runs.run.open = lambda *a: Halving(open(*a))",
    "before the summary": "die_at(os, 'replace', 1, when=lambda a, b: b.endswith('summary.json'))",
    "while its backbone trains": "shutil.rmtree('out/tiny/backbone'); "
                                 "die_at(torch.nn.utils, 'clip_grad_norm_', 3)",
}
CHILD = """
import json, os, shutil, signal, sys
import torch
import metrics, runs.run, train

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports a thousand modules at its first use
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
    kills = [(str(folders[where]), kill) for where, kill in KILLS.items()]
    child = start("-c", CHILD, json.dumps(kills), *tiny())
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
    assert same(checkpoint_of(BACKBONE)["model"], checkpoint_of(killed[""] / BACKBONE)["model"])
    names = {p.name for p in Path(RUN).iterdir()} - {"lock"}
    assert names == {"ckpt.pt", "config.json", "log.jsonl", "summary.json"}


# -----------------------------------------------------------------------------
# nothing overwritten

def test_a_finished_run_is_not_touched_by_its_command(done):
    before = snapshot(times=True)
    assert "finished already" in go("train", *tiny())
    assert "finished already" in go("train", *tiny("--threads=2", "--log_interval=7"))
    torch.set_num_threads(1)
    assert snapshot(times=True) == before


def test_a_finished_run_in_a_read_only_folder_is_finished(done, monkeypatch):
    def refuse(*args, **options):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr("runs.folder.FileLock.acquire", refuse)  # root may write everywhere
    assert "finished already" in go("train", *tiny())
    with pytest.raises(ConfigError, match="Read-only.*--out_dir"):
        go("train", *tiny("--seed=1"))


def test_overwrite_runs_again_to_the_same_numbers(done):
    before, log = snapshot(RUN, times=True), log_of(RUN)
    go("train", *tiny("--overwrite"))
    assert log_of(RUN) == log
    after = snapshot(RUN, times=True)
    assert after.keys() == before.keys() and all(after[k] != before[k] for k in before)


def test_overwrite_replaces_a_run_of_the_same_recipe_with_another_config(done):
    go("train", *tiny("--overwrite", "--gate_lr=0.5"))
    assert config_of(RUN)["gate_lr"] == 0.5 and summary_of(RUN)["steps"] == 6


@pytest.mark.parametrize("broken", ["nothing", "config.json", "ckpt.pt"])
@pytest.mark.parametrize("words", [[f"--out_dir={BACKBONE}"], [recipe("g1_full_aux"), f"--out_dir={RUN}"],
                                   [recipe("backbone"), f"--out_dir={RUN}"]], ids=["backbone", "arm", "gate"])
def test_overwrite_never_replaces_another_kind_of_run(words, broken, done):
    folder = Path(words[-1].partition("=")[2])
    if broken != "nothing":
        os.truncate(folder / broken, 100)
    before = snapshot(times=True)
    with pytest.raises(ConfigError, match=f"--overwrite does not replace it|{broken}"):
        go("train", *tiny(*words, "--overwrite"))
    assert snapshot(times=True) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("word", ["--gate_lr=0.5", "--lambda_rank=0.25", "--batch_size=8",
                                  "--eval_interval=3", "--n_embd=32", "--backbone_iters=5",
                                  "--oracle=on_policy"])
def test_another_config_in_the_same_place_is_refused_by_key_and_changes_nothing(word, finished, done):
    if not finished:
        os.remove(f"{RUN}/summary.json")
    before = snapshot(times=True)
    key = word[2:].partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key}\b.*--recipe, --seed or --out_dir.*--overwrite"):
        go("train", *tiny(word))
    assert snapshot(times=True) == before


def test_another_text_in_the_same_place_is_refused(done):
    write_jsonl("other.jsonl", make_documents(9))
    go("prepare", "--source=other.jsonl", "--name=tiny", "--tokenizer=bytes", "--overwrite")
    before = snapshot(RUN, times=True)
    with pytest.raises(ConfigError, match="data|identity"):
        go("train", *tiny())
    assert snapshot(RUN, times=True) == before


def test_a_run_that_trained_nothing_holds_its_folder_against_nobody(place, monkeypatch):
    def no_memory(*args):
        raise MemoryError("a batch of that size")
    with monkeypatch.context() as m:
        m.setattr(train, "forward_batch", no_memory)
        with pytest.raises(MemoryError):
            go("train", *tiny("--batch_size=16"))
    assert not Path(RUN, "ckpt.pt").exists()
    go("train", *tiny("--batch_size=2"))
    assert config_of(RUN)["batch_size"] == 2 and summary_of(RUN)["steps"] == 6
    go("train", *tiny("--batch_size=2", "--out_dir=out/calm"))
    assert same_run(RUN, "out/calm")


def test_a_second_process_in_one_folder_is_refused(place, monkeypatch):
    def stop(*args):
        raise Stopped
    words = tiny("--max_iters=1000000")
    monkeypatch.setattr(train, "get_batch", stop)  # a second run that is let in ends here
    first = start(HERE / "train.py", *words)
    try:
        for _ in range(1200):
            if Path(RUN, "ckpt.pt").exists() or first.poll() is not None:
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


def test_a_folder_that_is_a_link_is_written_through(place, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", "link")
    go("train", *tiny("--out_dir=link"))
    assert summary_of(tmp_path / "elsewhere")["steps"] == 6 and Path("link").is_symlink()
    os.symlink(tmp_path / "nowhere", "dangling")
    with pytest.raises(ConfigError, match="dangling"):
        go("train", *tiny("--out_dir=dangling"))


# -----------------------------------------------------------------------------
# a full disk

@pytest.mark.parametrize("error, text", [(OSError, "No space left on device"),
                                         (RuntimeError, "PytorchStreamWriter failed writing file")])
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
        with pytest.raises(ConfigError, match=rf"ckpt\.pt.*{text}.*intact"):
            go("train", *tiny())
    assert checkpoint_of(RUN)["step"] == 2
    assert not list(Path(RUN).glob("*.part"))
    go("train", *tiny())
    assert same_run(RUN, "out/calm")


def test_a_disk_full_at_a_log_line_is_one_clear_error_and_loses_nothing(place, monkeypatch):
    go("train", *tiny("--out_dir=out/calm"))

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 3800

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, line):
            self.left -= len(line)
            if self.left < 0:
                self.file.write(line[:10])
                raise OSError(28, "No space left on device")
            return self.file.write(line)

    def open_log(path, mode="r", *args, **options):
        file = open(path, mode, *args, **options)
        return Full(file) if "a" in mode else file

    with monkeypatch.context() as m:
        m.setattr(runs.run, "open", open_log, raising=False)
        with pytest.raises(ConfigError, match=r"log\.jsonl.*No space left"):
            go("train", *tiny())
    assert checkpoint_of(RUN)["step"] == 2
    go("train", *tiny())
    assert same_run(RUN, "out/calm")


def test_checkpoints_and_records_are_on_the_disk_before_they_get_their_name(place, monkeypatch):
    events, real_sync, real_replace = [], os.fsync, os.replace

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_sync(descriptor)

    def replace(a, b):
        events.append((os.path.abspath(a), os.path.abspath(b)))
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    go("train", *tiny())
    renamed = [i for i, event in enumerate(events) if isinstance(event, tuple)]
    names = [os.path.basename(events[i][1]) for i in renamed]
    assert names == ["config.json", "ckpt.pt", "ckpt.pt", "ckpt.pt", "summary.json"]
    for i in renamed:
        temporary, name = events[i]
        # the file, then its folder
        assert events[i - 1] == temporary and events[i + 1] == os.path.dirname(name)


# -----------------------------------------------------------------------------
# the same numbers

def test_a_seed_may_be_as_large_as_63_bits(place):
    go("train", *tiny(f"--seed={2 ** 63 - 1}", "--max_iters=1", "--out_dir=out/large"))
    assert summary_of("out/large")["steps"] == 1


@pytest.mark.parametrize("name, words", [("g3_full_aux", []), ("g1_full_aux", ["--oracle=on_policy"]),
                                         ("random", []), ("best", [])])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(name, words, place):
    for out, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(ord(out))  # the state that a run finds does not matter
        go("train", *tiny(recipe(name), *words, f"--seed={seed}", f"--out_dir=out/{out}"))
    assert same_run("out/a", "out/b")
    assert not set(losses_of("out/a").values()) & set(losses_of("out/c").values())
    a, c = (checkpoint_of(f"out/{x}")["model"] for x in "ac")
    assert not any(torch.equal(a[k], c[k]) for k in a if k.endswith("cheap.c_fc.weight"))


def test_how_often_a_run_evaluates_and_logs_changes_no_number(place):
    go("train", *tiny("--out_dir=out/a", "--eval_interval=2", "--log_interval=1"))
    go("train", *tiny("--out_dir=out/b", "--eval_interval=3", "--log_interval=2", "--eval_iters=1"))
    often, rarely = ({r["step"]: r for r in steps_of(f"out/{x}")} for x in "ab")
    assert set(rarely) == {0, 2, 4} and all(often[s] == rarely[s] for s in rarely)
    a, b = (checkpoint_of(f"out/{x}") for x in "ab")
    assert same(a["optimizers"], b["optimizers"]) and same(a["model"], b["model"])
    assert summary_of("out/a")["test_loss"] == summary_of("out/b")["test_loss"]


def test_the_number_of_threads_is_recorded(place):
    go("train", *tiny("--max_iters=1"))
    assert config_of(RUN)["threads"] == 1


@pytest.mark.parametrize("name, words", [("g3_full_aux", []), ("g1_full_aux", ["--oracle=on_policy"])])
def test_accumulation_gives_the_losses_of_one_batch(name, words, place):
    words = [recipe(name), *words, "--label_share=0.5", "--max_iters=4", f"--backbone={BACKBONE}"]
    go("train", *tiny(*words, "--out_dir=out/one"))
    go("train", *tiny(*words, "--batch_size=2", "--gradient_accumulation_steps=2", "--out_dir=out/two"))
    check_close("out/one", "out/two")


def flat(x):
    if isinstance(x, dict):
        return [v for k in sorted(x) for v in flat(x[k])]
    return [v for i in x for v in flat(i)] if isinstance(x, list) else [float(x)]


def check_close(a, b):
    """Two logs have the same records, and their numbers agree to float tolerance."""
    a, b = steps_of(a), steps_of(b)
    assert [r.keys() for r in a] == [r.keys() for r in b] and len(a) > 2
    for x, y in zip(a, b):
        # Under ste_norm nothing but labels moves a row's mean score. Where it lies otherwise is rounding,
        # which Adam makes as large as a step.
        means = [r.get("scores", {}).pop("mean", []) for r in (x, y)]
        assert means[0] == pytest.approx(means[1], abs=0.01)
        tolerance = 2e-4 if x["step"] < 3 else 5e-3
        assert x["losses"].keys() == y["losses"].keys() and x["grad_norm"].keys() == y["grad_norm"].keys()
        assert flat(x) == pytest.approx(flat(y), rel=tolerance, abs=tolerance)


def test_a_share_of_labels_that_slices_cannot_share_evenly_is_refused(place):
    words = tiny("--label_share=0.25", f"--backbone={BACKBONE}", "--batch_size=2",
                 "--gradient_accumulation_steps=2")
    with pytest.raises(ConfigError, match="label_share=0.25.*2 rows"):
        go("train", *words)


def test_calibrating_in_chunks_sets_the_thresholds_of_one_forward(done):
    model, config, data, _, _ = runs.run.load_run(RUN, {"device": "cpu", "dtype": "float32"})
    rows = eval_batch(data["train"], config, 10 ** 6)
    assert len(rows.tokens) > 20
    thresholds = {}
    for size in (10 ** 6, 7, 1):
        model.calibrate(Context(rows.tokens, rows.row_seeds), rows=size)
        thresholds[size] = torch.stack([model.h[i].threshold for i in model.config.controlled])
    torch.testing.assert_close(thresholds[7], thresholds[10 ** 6], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(thresholds[1], thresholds[10 ** 6], rtol=1e-5, atol=1e-6)
    largest = 0

    def note(module, args):
        nonlocal largest
        largest = max(largest, len(args[0]))
    model.h[0].attn.register_forward_pre_hook(note)
    model.calibrate(Context(rows.tokens.repeat(9, 1), rows.row_seeds.repeat(9)))
    assert largest == 64 < 9 * len(rows.tokens)


# -----------------------------------------------------------------------------
# several processes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def files_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != "lock"}


def test_two_processes_give_the_losses_of_one_with_one_log_and_one_checkpoint(templates, tmp_path,
                                                                              monkeypatch):
    for folder in ("one", "two"):  # no backbone: it trains on two processes too
        shutil.copytree(templates / "place" / "data", tmp_path / folder / "data")
    words = tiny("--max_iters=4")
    child = start(*TORCHRUN, HERE / "train.py", *words, cwd=tmp_path / "two")
    monkeypatch.chdir(tmp_path / "one")
    go("train", *words)
    code, out, err = finish(child)
    assert code == 0, err
    for run in (BACKBONE, RUN):
        check_close(run, tmp_path / "two" / run)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert [r["step"] for r in log_of(tmp_path / "two" / RUN)] == [r["step"] for r in log_of(RUN)]
    a, b = (checkpoint_of(f / RUN)["model"] for f in (tmp_path / "one", tmp_path / "two"))
    # Under ste_norm a shift of all scores changes nothing. So the gradient of that bias is rounding, which
    # Adam scales up, and the threshold moves with it.
    shifts = [k for k in a if k.endswith((".scorer.2.bias", ".threshold"))]
    assert all(torch.allclose(a[k], b[k], atol=1e-3) for k in a if k not in shifts)
    for layer in (1, 2):
        above = [m[f"h.{layer}.threshold"] - m[f"h.{layer}.gate.scorer.2.bias"] for m in (a, b)]
        assert torch.allclose(*above, atol=1e-3)
    assert len(re.findall("^step 3/4", out, re.M)) == 2  # the backbone's and the run's, not twice that


DYING = """
import os, signal, train
from configurator import exit_on_error
real = train.get_batch
def get_batch(data, config, step, micro, machine):
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(data, config, step, micro, machine)
train.get_batch = get_batch
exit_on_error(train.main)
"""


def test_when_one_process_dies_the_others_end_and_the_checkpoint_is_whole(place):
    Path("dying.py").write_text(DYING)
    code, _, _ = finish(start(*TORCHRUN, "dying.py", *tiny()), 120)
    assert code != 0
    assert checkpoint_of(RUN)["step"] == 2 and not Path(RUN, "summary.json").exists()
    claim(RUN, config_of(RUN), False).release()  # nobody holds the folder any more


# -----------------------------------------------------------------------------
# the frozen backbone

def test_the_backbone_is_trained_once_and_reused(place):
    before = snapshot("out/tiny/backbone", times=True)
    for words in (tiny(), tiny(recipe("g1_full_aux"), "--seed=3")):
        assert "training it once" not in go("train", *words)
    assert snapshot("out/tiny/backbone", times=True) == before
    a, b = summary_of(RUN), summary_of("out/tiny/g1_full_aux/seed3")
    assert a["backbone"] == b["backbone"]
    assert a["identity"] == b["identity"] == summary_of(BACKBONE)["identity"]


@pytest.mark.parametrize("change", ["--backbone_iters=5", "--backbone_lr=1e-4", "--backbone_seed=1",
                                    "--n_embd=32", "--dataset=other"])
def test_another_config_or_text_gets_another_backbone_and_leaves_the_first(change, done):
    write_jsonl("other.jsonl", make_documents(9))
    go("prepare", "--source=other.jsonl", "--name=other", "--tokenizer=bytes")
    before = snapshot("out/tiny/backbone", times=True)
    go("train", *tiny(change, "--max_iters=1", "--out_dir=out/other"))
    old, new = summary_of(RUN), summary_of("out/other")
    assert new["identity"] != old["identity"]
    assert all(new["backbone"][key] != old["backbone"][key] for key in ("weights", "path"))
    # another seed has its own folder anyway
    assert new["identity"] in new["backbone"]["path"] or change == "--backbone_seed=1"
    after = snapshot("out/tiny/backbone", times=True)
    assert all(after[path] == before[path] for path in before if before[path] != "folder")
    go("train", *tiny(change, "--max_iters=1", "--seed=1", "--out_dir=out/again"))
    assert summary_of("out/again")["backbone"] == new["backbone"]


@pytest.mark.parametrize("words", [["--batch_size=2", "--gradient_accumulation_steps=2"], ["--grad_clip=0.5"],
                                   ["--beta2=0.99"], ["--min_lr_ratio=0.5"], ["--learning_rate=0.01"],
                                   ["--weight_decay=0"], ["--eval_interval=1"], ["--log_interval=3"]],
                         ids=str)
def test_how_a_gate_is_optimised_does_not_ask_for_another_backbone(words, place):
    go("train", *tiny(*words, "--max_iters=1"))
    assert summary_of(RUN)["backbone"]["path"] == BACKBONE


def resave(path, change):
    """Change the dict of a checkpoint, as one who knows how: its digest goes."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint.pop("digest")
    change(checkpoint)
    torch.save(checkpoint, path)


@pytest.mark.parametrize("use", ["resume", "eval_only", "sample"])
def test_a_gate_refuses_a_backbone_that_has_changed(use, done):
    def change(checkpoint):
        checkpoint["model"]["h.1.mlp.c_fc.weight"][0, 0] += 1e-3
    os.remove(f"{RUN}/summary.json")
    resave(f"{BACKBONE}/ckpt.pt", change)
    before = snapshot(times=True)
    commands = {"sample": ("sample", RUN, "--max_new_tokens=1"), "resume": ("train", *tiny()),
                "eval_only": ("train", *tiny("--eval_only"))}
    with pytest.raises(ConfigError, match="another backbone"):
        go(*commands[use])
    assert snapshot(times=True) == before


@pytest.mark.parametrize("name", ["g3_full_aux", "best", "full_adapter", "cheap_only", "static"])
def test_only_the_controllers_train_and_the_backbone_ends_as_it_began(name, place, monkeypatch):
    held, real = [], runs.run.make_optimizers

    def make_optimizers(model, config, dtype):
        optimizers = real(model, config, dtype)
        held.append((model, {n: p.detach().clone() for n, p in model.named_parameters()}, optimizers))
        return optimizers

    monkeypatch.setattr(runs.run, "make_optimizers", make_optimizers)
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
    dense = checkpoint_of(BACKBONE)["model"]
    backbone = model.backbone()
    assert all(torch.equal(p, dense[n]) for n, p in backbone.items())
    summary = summary_of(f"out/tiny/{name}/seed0")
    assert summary["frozen_hash"]["before"] == summary["frozen_hash"]["after"]
    assert summary["backbone"]["weights"] == weights_hash({n: dense[n] for n in backbone})
    assert summary["trained_parameters"] == sum(start_weights[n].numel() for n in controllers)


def test_a_frozen_weight_that_moves_stops_the_run_before_a_summary(place, monkeypatch):
    real = train.forward_batch

    def forward_batch(model, *args):
        with torch.no_grad():
            model.h[0].mlp.c_fc.bias[0] += 1e-4
        return real(model, *args)

    monkeypatch.setattr(train, "forward_batch", forward_batch)
    with pytest.raises(ConfigError, match="frozen"):
        go("train", *tiny())
    assert not Path(RUN, "summary.json").exists()


# -----------------------------------------------------------------------------
# a loss that is no number

def poison(monkeypatch, at, what):
    """Make `what` (a loss, or the weights after the step) not finite at step `at`."""
    real_batch, real_losses, real_stepped = train.get_batch, train.active_losses, runs.run.Run.stepped
    now = []

    def get_batch(data, config, step, micro, machine):
        now[:] = [step]
        return real_batch(data, config, step, micro, machine)

    def losses(config):
        poisoned = dict(real_losses(config))
        if what in poisoned:
            loss = poisoned[what]
            poisoned[what] = broken(loss)
        return poisoned

    def broken(loss):
        def value(step):
            return loss(step) * (math.nan if now == [at] else 1)
        value.needs = loss.needs
        return value

    def stepped(run, *args):
        if what == "weights" and run.step == at:
            with torch.no_grad():
                run.model.h[1].cheap.c_proj.weight.fill_(math.nan)
        real_stepped(run, *args)

    monkeypatch.setattr(train, "get_batch", get_batch)
    monkeypatch.setattr(train, "active_losses", losses)
    monkeypatch.setattr(runs.run.Run, "stepped", stepped)


def check_last_good(step):
    """The checkpoint is the one of this step, and finite; at step 0 there is none."""
    assert Path(RUN, "ckpt.pt").exists() == (step > 0) and not Path(RUN, "summary.json").exists()
    if step:
        checkpoint = checkpoint_of(RUN)
        assert checkpoint["step"] == step
        assert all(v.isfinite().all() for k, v in checkpoint["model"].items() if "threshold" not in k)


@pytest.mark.parametrize("log_interval", [1, 100])
@pytest.mark.parametrize("name", ["lm", "util", "rank", "jepa"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_loss(name, log_interval, place,
                                                                        monkeypatch):
    poison(monkeypatch, 3, name)
    with pytest.raises(ConfigError, match=rf"the {name} loss is nan at step 3\b.*last good checkpoint"):
        go("train", *tiny(f"--log_interval={log_interval}"))
    check_last_good(2)


@pytest.mark.parametrize("step", [1, 5])
def test_weights_that_break_right_before_an_evaluation_never_reach_a_checkpoint(step, place, monkeypatch):
    poison(monkeypatch, step, "weights")
    says = "the last good checkpoint" if step > 1 else "no checkpoint yet"
    with pytest.raises(ConfigError, match=says):
        go("train", *tiny())
    check_last_good(step - 1)


def test_a_learning_rate_that_explodes_ends_with_exit_code_2_and_one_line(place, capfd):
    words = ["--learning_rate=1e9", "--gate_lr=1e9", "--max_iters=20", "--log_interval=100", "--grad_clip=0",
             "--weight_decay=1e9"]
    with pytest.raises(SystemExit) as stop:
        exit_on_error(lambda: go("train", *tiny(*words)))
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "step" in err and "loss" in err
    check_last_good(0)


# -----------------------------------------------------------------------------
# what comes out

@pytest.mark.parametrize("name", RECIPES)
def test_every_config_resolves(name):
    config = validate(resolved(name))
    assert name in (config["recipe"], config["scale"])


@pytest.mark.parametrize("name", [*CONTROLLERS, "backbone", "backbone_long"])
def test_every_recipe_trains(name, place):
    go("train", *tiny(recipe(name), "--max_iters=2", "--eval_interval=1", "--out_dir=out/run"))
    evaluations, summary = [r for r in log_of("out/run") if "val_loss" in r], summary_of("out/run")
    steps, config = steps_of("out/run"), resolved(name)
    assert [r["step"] for r in steps] == [0, 1] and [r["step"] for r in evaluations] == [0, 1, 2]
    assert all(map(math.isfinite, flat([r["losses"] for r in steps] + [r["val_loss"] for r in evaluations])))
    assert all(map(math.isfinite, summary["val_loss"].values()))
    for record in steps:
        assert set(record["losses"]) == {"lm", *active_losses(config)}
    learned = config["mode"] == "topk" and config["gate"] in ("g1", "g3")
    for loss in ("util", "rank"):
        assert (loss in steps[1]["losses"]) == (learned and config[f"lambda_{loss}"] > 0)
    labelled = learned and config["lambda_rank"] > 0
    jepa = config["mode"] == "topk" and config["gate"] == "g3" and config["lambda_jepa"] > 0
    assert ("jepa" in steps[1]["losses"]) == jepa
    if config["mode"] == "topk":
        # 16 tokens a row: rounding moves a layer's share by 1/32 at most
        assert sum(summary["realised_budget"]["topk"]) / 2 == pytest.approx(config["budget"], abs=1 / 32)


def test_every_recipe_of_controllers_is_here():
    assert set(CONTROLLERS) >= {"g1_full_aux", "g3_full_aux", "g1_no_utilrank", "g3_no_utilrank", "static",
                                "random", "cheap_only", "full_adapter", "best", "linear"}


def evaluated(*words):
    return json.loads(go("train", *tiny("--eval_only", *words)).splitlines()[-1])


def test_eval_only_prints_a_budgets_losses_as_json_and_changes_nothing(done):
    before = snapshot(times=True)
    half, quarter = evaluated(), evaluated("--budget=0.25")
    assert snapshot(times=True) == before
    assert half["val_loss"] == pytest.approx(summary_of(RUN)["val_loss"])
    assert quarter["budget"] == 0.25 and set(quarter["val_loss"]) == {"topk", "threshold"}
    assert quarter["val_loss"] != half["val_loss"]
    assert quarter["realised_budget"]["topk"] == [0.25, 0.25]
    assert all(abs(b - 0.25) < 0.15 for b in quarter["realised_budget"]["threshold"])


@pytest.mark.parametrize("budget, share", [(0, 0), (1, 1)])
def test_eval_only_at_the_ends_of_the_budget(budget, share, done):
    result = evaluated(f"--budget={budget}")
    assert result["realised_budget"] == {"topk": [share] * 2, "threshold": [share] * 2}
    if budget == 1:
        assert result["val_loss"]["threshold"] == pytest.approx(summary_of(RUN)["dense_val_loss"], abs=1e-5)


def test_eval_only_of_a_backbone_prints_its_loss(done):
    result = evaluated(recipe("backbone"))
    assert result["val_loss"]["full"] == pytest.approx(summary_of(RUN)["dense_val_loss"])


def test_a_summary_has_what_a_comparison_needs(done):
    summary = summary_of(RUN)
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    assert summary["data"] == {s: v["sha256"] for s, v in meta["splits"].items()}
    assert set(summary["val_loss"]) == set(summary["test_loss"]) == set(summary["realised_budget"])
    assert set(summary["val_loss"]) == {"topk", "threshold"}
    curve = [r["val_loss"]["threshold"] for r in log_of(RUN) if "val_loss" in r]
    assert [e["threshold"] for e in summary["evaluations"]] == curve and len(curve) == 4
    assert summary["best_val_loss"]["threshold"] == min(curve)
    assert summary["average_val_loss"]["threshold"] == pytest.approx(sum(curve[1:]) / (len(curve) - 1))
    assert summary["steps"] == 6 and summary["seconds"] > 0 and summary["flops"]["forward_proxy"] > 1


def test_gap_closed_is_measured_against_both_references(done):
    for name in ("cheap_only", "full_adapter"):
        assert isinstance(summary_of(RUN)["gap_closed"], str)
        go("train", *tiny(recipe(name)))
    go("train", *tiny("--overwrite"))
    floor, top = (summary_of(f"out/tiny/{n}/seed0") for n in ("cheap_only", "full_adapter"))
    loss = summary_of(RUN)["val_loss"]["threshold"]
    gap = metrics.gap_closed(loss, floor["val_loss"]["cheap"], top["val_loss"]["adapter"])
    assert summary_of(RUN)["gap_closed"] == pytest.approx(gap)


@pytest.mark.parametrize("break_it", ["config.json", "summary.json", "both"])
def test_a_broken_reference_is_a_missing_one(break_it, done):
    for name in ("cheap_only", "full_adapter"):
        go("train", *tiny(recipe(name)))
    for name in ("config.json", "summary.json") if break_it == "both" else (break_it,):
        Path("out/tiny/cheap_only/seed0", name).write_text('{"val_loss": {}')
    go("train", *tiny("--overwrite"))
    assert "not finished" in summary_of(RUN)["gap_closed"]
    Path("out/tiny/cheap_only/seed0", "config.json").unlink()
    go("train", *tiny("--overwrite"))
    assert "not finished" in summary_of(RUN)["gap_closed"]


def unlabelled(text):
    """The lines that print a topk loss without saying that it is not causal."""
    lines = [line for line in text.splitlines() if "loss" in line and re.search(r"topk.*\d|\d.*topk", line)]
    return [line for line in lines if not re.search("not.causal|non.causal", line)]


def test_topk_losses_are_labelled_not_causal_wherever_they_are_printed(done):
    assert unlabelled('val_loss: {"topk": 1.5}')
    out = go("train", *tiny("--overwrite")) + go("train", *tiny("--eval_only"))
    assert "topk" in out and not unlabelled(out)


# -----------------------------------------------------------------------------
# sample.py

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


@pytest.mark.parametrize("words", [["--mode=full"], ["--mode=cheap"], ["--budget=0"], ["--budget=1"],
                                   ["--temperature=0"], ["--max_new_tokens=40"]], ids=str)
def test_sample_repeats_itself(words, done):
    words = [RUN, "--prompt=the", *words, *([] if "new" in words[0] else ["--max_new_tokens=10"])]
    assert go("sample", *words) == go("sample", *words) != ""


def test_sample_shows_every_token_full_at_budget_1_and_none_at_0(done):
    for budget, digit in ((1, "2"), (0, "0")):
        out = go("sample", RUN, "--prompt=the", "--max_new_tokens=8", f"--budget={budget}")
        assert f"full at {digit}.00 of 2" in out


def test_sample_of_a_backbone(done):
    assert go("sample", BACKBONE, "--prompt=the", "--max_new_tokens=5").startswith("the")


def test_sample_goes_on_past_the_context_of_one_token(done):
    go("train", *tiny("--block_size=1", "--max_iters=1", "--backbone_iters=1", "--out_dir=out/one"))
    assert "full at" in go("sample", "out/one", "--prompt=t", "--max_new_tokens=5", "--temperature=0")


# -----------------------------------------------------------------------------
# the quickstart

def test_the_quickstart_makes_text_backbone_and_gate_and_shows_the_routing(quickstart):
    folder, code, out, err = quickstart
    assert code == 0, err
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_dir()} == {
        "data", "data/stdlib", "out", "out/tiny", "out/tiny/backbone", BACKBONE, "out/tiny/g3_full_aux", RUN}
    summary = summary_of(folder / RUN)
    assert summary["steps"] == 4 and all(map(math.isfinite, summary["val_loss"].values()))
    # one digit under each token: of 5 layers, how many ran full
    assert re.search(r"^[0-5]{100}$", out, re.M)
    assert not unlabelled(out)
