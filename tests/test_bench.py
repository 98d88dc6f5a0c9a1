"""bench.py: every row runs, what is timed as a step is train.py's step, and the limits mean what they say."""
import os
import subprocess
import sys

import pytest
import torch

import bench
from configurator import HERE, ConfigError, read_arms
from conftest import go, log_of, recipe, tiny
from gates import ESTIMATORS, Route
from prepare import load_data
from train import configure_run

SMALL = tiny("--dataset=stdlib", "--repeat=1")
NANOGPT = """
import torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float; bias: bool
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
    """An empty folder and an idle machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0.1, 0.1))
    return tmp_path


@pytest.fixture
def llama(here):
    """The words of a benchmark of a tiny random Llama in a Hugging Face folder, of the shape of SMALL."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                                      num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
    transformers.LlamaForCausalLM(config).save_pretrained("llama")
    vocabulary = {text: i for i, text in enumerate(["</s>", *tokenizers.pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    tokenizer.save("llama/tokenizer.json")
    return [*SMALL, "--backbone=hf:llama"]


def table(out):
    """What was printed -> {what: (figure, limit or None, note)}; all figures are positive."""
    lines = [line[2:-2].split(" | ") for line in out.splitlines() if line.startswith("| ")]
    rows = {}
    for what, figure, limit, part, note in lines[1:]:
        figure, limit = float(figure.replace(",", "")), float(limit) if limit else None
        assert figure > 0 and (limit is None or float(part) == pytest.approx(figure / limit, abs=0.01, rel=0.01))
        rows[what] = figure, limit, note
    return rows


# -----------------------------------------------------------------------------
# rows

@pytest.mark.parametrize("name, count", [("forward", 4), ("training", 7), ("decode", 2), ("prefill", 1)])
def test_every_timed_row_runs_beside_its_limit(name, count, here):
    out = go("bench", *SMALL, f"--rows={name}")
    rows = table(out)
    assert len(rows) == count and "warning" not in out
    assert all(limit > 0 and "tokens/s" in note for _, limit, note in rows.values())


def test_transformers_runs_the_same_weights_in_the_same_run(llama):
    rows = table(go("bench", *llama, "--rows=decode,prefill"))
    assert [what for what in rows if "transformers' generate" in what] and len(rows) == 7
    [note] = [note for what, (_, _, note) in rows.items() if "differ by" in note]
    assert float(note.split()[-1]) < 1e-4


def test_a_nanogpt_is_timed_in_the_same_run(here):
    (here / "model.py").write_text(NANOGPT)
    out = go("bench", *SMALL, "--rows=nanogpt", f"--baseline={here}")
    assert len(table(out)) == 2 and "decayed" not in out


def test_memory_is_that_of_a_training():
    words = tiny("--rows=memory", "--arm=dense", "--dataset=stdlib", "--n_embd=512")
    done = subprocess.run([sys.executable, f"{HERE}/bench.py", *words], capture_output=True, text=True, check=True)
    [(peak, _, _)] = table(done.stdout).values()
    weights = 4 * 3 * 12 * 512 ** 2 / 2 ** 20  # MiB
    assert 100 + 4 * weights < peak < 800 + 5 * weights  # weights, gradients and AdamW's two


def test_the_ledger_has_every_arm(here):
    out = go("bench", *SMALL, "--rows=ledger")
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in out.splitlines() if line.startswith("| ")}
    assert {"best", "static", "g3_full_aux", "backbone_long"} | set(read_arms()) < rows.keys()
    step = {arm: float(cells[1]) for arm, cells in rows.items() if arm != "arm"}
    assert step["backbone"] == 1 and step["g1_distill"] > step["g1_no_utilrank"]


# -----------------------------------------------------------------------------
# what a row means

@pytest.mark.parametrize("arm", ["g1_full_aux", "distill_labels"])
def test_a_step_is_the_step_of_train(arm, place):
    """From the same weights on the same text: the same losses and, after three steps, the same weights."""
    words = tiny(recipe(arm), "--gradient_accumulation_steps=2", "--max_iters=3")
    go("train", *words)
    config = configure_run(words)[0]
    made = bench.Bench(config, {})
    made.vocab_size = 257
    run = made.run(config)
    run.data = load_data("tiny", config["block_size"])[0]
    run.model.load_state_dict(weights_of("backbone"), strict=False)
    for layer in config["controlled"]:
        torch.nn.init.zeros_(run.model.h[layer].cheap.c_proj.weight)
    losses = [bench.one_step(run) for _ in range(3)]
    logged = [record["losses"] for record in log_of(f"out/tiny/{arm}/seed0") if "losses" in record]
    for ours, expected in zip(losses, logged, strict=True):
        assert ours and all(value.item() == expected[name] for name, value in ours.items())
    expected = weights_of(arm)
    assert all(torch.equal(p, expected[name]) for name, p in run.model.controllers().items())


def weights_of(arm):
    return torch.load(f"out/tiny/{arm}/seed0/ckpt.pt", weights_only=True)["model"]


def test_decoding_reads_the_path_that_somebody_takes(here):
    made = bench.Bench(*bench.read_words(SMALL)[:2])
    model = made.model(made.arm("g1_no_utilrank"))
    full, cheap, gate = (bench.size(part) for part in (model.h[1].mlp, model.h[1].cheap, model.h[1].gate))
    controllers = bench.size(model) - sum(p.nbytes for p in model.backbone().values())
    dense = bench.bytes_read(model, "full")
    assert dense == bench.size(model) - controllers - model.wpe.weight.nbytes
    assert bench.bytes_read(model, "cheap") == dense - 2 * full + 2 * cheap

    def read(*mask):  # layer 1 alone decides
        one = bench.bytes_read(model, "threshold", [Route(1, None, torch.tensor([[m] for m in mask]))])
        return one - (dense - 2 * full + cheap)  # less what does not depend on it: layer 2 is cheap
    assert read(True) == gate + full and read(False) == gate + cheap and read(True, False) == gate + full + cheap
    model.h[1].estimator = ESTIMATORS["scaled"]()  # it mixes: a full token needs cheap too
    assert read(True) == gate + full + cheap and read(False) == gate + cheap


# -----------------------------------------------------------------------------
# the command line

def test_a_busy_machine_is_said(here, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 1.0, 1.0))
    assert "warning: the machine is not idle (load average 1.50)" in go("bench", *SMALL, "--rows=prefill")


@pytest.mark.parametrize("words, needles", [
    (["--rows=forward", "--repeat=0"], ["--repeat=0", "1 or more"]),
    (["--rows=memry"], ["memry", "memory"]),
    (["--baseline=nowhere"], ["nowhere", "nanoGPT"]),
    (["--rows=memory", "--arm=bets"], ["bets", "best"]),
    (["config/best.py"], ["recipe"]),
    (["--repeat"], ["needs a value"]),
    (["--batch_size=0"], ["batch_size"])])
def test_bad_words_are_one_line(words, needles, here):
    with pytest.raises(ConfigError) as error:
        go("bench", *words)
    assert all(needle in str(error.value) for needle in needles) and "\n" not in str(error.value)


def test_from_a_shell_a_mistake_exits_with_2():
    done = subprocess.run([sys.executable, f"{HERE}/bench.py", "--repeat=0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
