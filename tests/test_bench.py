"""bench.py: every row runs, a step is train.py's step, and limits, aims and verdicts mean what they say."""
import json
import os
import subprocess
import sys

import pytest
import torch

import bench
import prepare
from configurator import HERE, ConfigError
from conftest import go, log_of, make_documents, recipe, tiny, write_jsonl
from gates import ESTIMATORS, Route
from prepare import load_data
from train import configure_run

SMALL = tiny("--dataset=stdlib", "--repeat=1")
NANOGPT = """
import torch
class GPTConfig:
    def __init__(self, **fields):
        self.__dict__.update(fields)
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        print("num decayed parameter tensors: 1")
        return torch.optim.AdamW(self.parameters(), lr=learning_rate)
    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, an idle machine, and matrix products that take no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(bench, "peak_flops", lambda dtype, of: 1e11)
    return tmp_path


def result(*words):
    """-> what the benchmark printed, and the JSON of its last line."""
    out = go("bench", *SMALL, *words)
    return out, json.loads(out.splitlines()[-1])


# -----------------------------------------------------------------------------
# rows

@pytest.mark.parametrize("name, count", [("forward", 4), ("training", 6), ("labels", 4), ("distillation", 1),
                                         ("decode", 1)])
def test_every_timed_row_runs_and_is_printed_as_it_is_recorded(name, count, here):
    out, facts = result(f"--rows={name}")
    assert len(facts["rows"]) == count
    for row in facts["rows"]:
        assert row["figure"] > 0 and row["limit"] > 0
        assert f"| {row['what']} | {row['figure']:.3f} | {row['limit']:.3f} | {row['part']:.3f} | " in out
    assert "warning" not in out


def test_memory_is_measured_in_a_process_of_its_own(here, monkeypatch):
    monkeypatch.setattr(bench, "MEMORY_ARMS", ["best"])
    ballast = bytearray(300_000_000)  # what this process holds must not count
    row = result("--rows=memory")[1]["rows"][0]
    assert ballast and row["limit"] is None and row["aim"] == "<= 0.5"
    assert 0.1 < row["figure"] < 5 and int(row["note"].split()[0].replace(",", "")) < 250


def test_a_nanogpt_is_timed_in_the_same_run_and_what_is_a_wish_is_no_limit(here):
    (here / "model.py").write_text(NANOGPT)
    out, facts = result("--rows=nanogpt", f"--baseline={here}")
    step, forward = facts["rows"]
    assert (step["limit"], step["aim"]) == (None, ">= 1.0")
    assert forward["aim"] == ">= 4.0" and forward["limit"] != 4.0 and "decayed" not in out


def test_tokenizing_is_measured_or_left_out_with_a_reason(here, capsys, monkeypatch):
    write_jsonl("text.jsonl", make_documents(0))
    monkeypatch.setattr(bench, "tokenizer", bytes_for_gpt2)
    monkeypatch.setattr(prepare, "tokenizer", bytes_for_gpt2)
    [row] = result("--rows=tokenizing", "--text=text.jsonl")[1]["rows"]
    assert row["figure"] > 0 and "MB/s" in row["note"] and not (here / "data").exists()

    def refuse(name):
        raise ConfigError("no vocabulary")
    monkeypatch.setattr(bench, "tokenizer", refuse)
    assert result("--rows=tokenizing")[1]["rows"] == [] and "no vocabulary" in capsys.readouterr().err


def bytes_for_gpt2(name, tokenizer=prepare.tokenizer):
    return tokenizer("bytes")  # needs no network


def test_the_ledger_has_every_arm(here):
    out, facts = result("--rows=ledger")
    assert {"best", "static", "backbone", "old_best", "best_budget25"} <= facts["ledger"].keys()
    assert facts["ledger"]["backbone"]["train_ratio"] == 1 and "| best | " in out
    assert facts["ledger"]["g1_distill"]["train_ratio"] > facts["ledger"]["g1_no_utilrank"]["train_ratio"]


def test_a_profile_names_twelve_operators_and_what_is_outside_of_them(here):
    out, facts = result("--rows=profile", "--arm=g1_distill")
    facts = facts["profile"]["float32"]
    assert len(facts["largest"]) == 12 and "A step of g1_distill, float32" in out
    assert 0 < sum(facts["largest"].values()) <= facts["operators_ms"] < facts["profiled_ms"]


# -----------------------------------------------------------------------------
# what a row means

@pytest.mark.parametrize("arm", ["g1_full_aux", "best"])
def test_a_step_is_the_step_of_train(arm, place):
    """From the same weights on the same text: the same losses and, after three steps, the same weights."""
    words = tiny(recipe(arm), "--gradient_accumulation_steps=2", "--max_iters=3", "--keep_checkpoints")
    go("train", *words)
    config, _ = configure_run(words)
    case = bench.Case(config, 257)
    case.data = load_data("tiny", config["block_size"])[0]
    for weights in weights_of("backbone", "ckpt"), weights_of(arm, "ckpt-0"):
        case.model.load_state_dict(weights, strict=False)
    losses = [bench.one_step(case) for _ in range(3)]
    logged = [record["losses"] for record in log_of(f"out/tiny/{arm}/seed0") if "losses" in record]
    for ours, expected in zip(losses, logged, strict=True):
        assert ours and all(value.item() == expected[name] for name, value in ours.items())
    expected = weights_of(arm, "ckpt-3")
    assert all(torch.equal(p, expected[name]) for name, p in case.model.controllers().items())


def weights_of(arm, name):
    return torch.load(f"out/tiny/{arm}/seed0/{name}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("figure, limit, aim, met", [
    (0.50006, None, bench.Aim(0.5, at_most=True), True),
    (0.5006, None, bench.Aim(0.5, at_most=True), False),
    (0.49996, None, bench.Aim(0.5), True),
    (1.05043, 1.0, bench.Aim(1.05, at_most=True, of_limit=True), True),
    (1.0506, 1.0, bench.Aim(1.05, at_most=True, of_limit=True), False),
    (1.8, 2.0, bench.Aim(0.9, of_limit=True), True),
    (1.8, 2.0, bench.Aim(0.95, of_limit=True), False),
    (1.8, 2.0, None, None)])
def test_a_figure_is_compared_as_it_is_printed(figure, limit, aim, met):
    facts = bench.Row("what", figure, limit, aim).facts()
    assert facts["met"] is met
    assert (" met |" in bench.table_line(facts)) == (met is True)
    assert (" missed |" in bench.table_line(facts)) == (met is False)


def test_decoding_reads_the_path_that_somebody_takes():
    config, _ = configure_run(tiny(recipe("g1_no_utilrank")))
    model = bench.Case(config, 257).model
    full, cheap = bench.size(model.h[1].mlp), bench.size(model.h[1].cheap)
    everything = bench.bytes_read(model, [[]])

    def spared(*masks):
        masks = [torch.tensor(mask) for mask in masks]
        return everything - bench.bytes_read(model, [[Route(1, mask.float(), mask)] for mask in masks])
    assert spared([[True]]) == cheap and spared([[False]]) == full
    assert spared([[True]], [[False]]) == (cheap + full) / 2
    assert spared([[True], [False]]) == 0
    model.h[1].estimator = ESTIMATORS["scaled"]  # it mixes
    assert spared([[True]]) == 0 and spared([[False]]) == full


# -----------------------------------------------------------------------------
# the command line

def test_a_busy_machine_is_said(here, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 1.0, 1.0))
    out, facts = result("--rows=distillation")
    assert "warning: the machine is not idle (load average 1.50)" in out and facts["load"] == 1.5


@pytest.mark.parametrize("words, needles", [
    (["--rows=forward", "--repeat=0"], ["--repeat=0", "1 or more"]),
    (["--rows=memry"], ["memry", "known:"]),
    (["--baseline=nowhere"], ["nowhere", "nanoGPT"]),
    (["--rows=profile", "--arm=bets"], ["bets", "best"]),
    (["config/best.py"], ["--arm"]),
    (["--repeat"], ["needs a value"]),
    (["--batch_size=0"], ["batch_size"])])
def test_bad_words_are_one_line(words, needles, here):
    with pytest.raises(ConfigError) as error:
        bench.read_words(words)
    assert all(needle in str(error.value) for needle in needles) and "\n" not in str(error.value)


def test_a_folder_that_is_no_nanogpt_is_one_line(here):
    (here / "model.py").write_text("class GPT: pass\n")
    with pytest.raises(ConfigError, match="is no nanoGPT"):
        result("--rows=nanogpt", f"--baseline={here}")


def test_from_a_shell_a_mistake_exits_with_2_and_nothing_heavy_is_imported():
    code = ("import bench, sys; print([m for m in ('study', 'matplotlib', 'scipy') if m in sys.modules]); "
            "sys.argv = ['bench.py', '--repeat=0']; bench.exit_on_error(bench.main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stdout == "[]\n"
