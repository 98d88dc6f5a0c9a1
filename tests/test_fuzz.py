"""Random shapes, budgets, dtypes, ties and seeds, and random damage to what a run left.

`--hypothesis-profile=long` goes on for longer with the first, `--mutations=1000` with the second.
"""
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configurator import ConfigError
from conftest import checkpoint_of, go, log_of, same, snapshot, summary_of, tiny
from gates import ESTIMATORS, GATES, Context, full_tokens, threshold_for, topk_mask
from model import GPT, GPTConfig
from sample import new_cache

budgets = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
seeds = st.integers(0, 2 ** 31)
gates, estimators = st.sampled_from(sorted(GATES)), st.sampled_from(sorted(ESTIMATORS))


# -----------------------------------------------------------------------------
# routing

@st.composite
def scores(draw):
    """(B, T) with many ties, or none, and now and then an infinity."""
    torch.manual_seed(draw(seeds))
    values = torch.randn(draw(st.integers(1, 5)), draw(st.integers(1, 40)))
    if draw(st.booleans()):
        values = (values * draw(st.integers(0, 3))).round()
    if draw(st.booleans()):
        place = draw(st.integers(0, values.numel() - 1))
        values.flatten()[place] = draw(st.sampled_from([float("inf"), float("-inf"), 0.0, -0.0]))
    return values


def small_model(gate, estimator, budget, seed, block_size=24):
    torch.manual_seed(seed)
    config = GPTConfig(block_size=block_size, vocab_size=31, n_layer=3, n_head=2, n_embd=16,
                       controlled=(0, 2), cheap_rank=3, gate=gate, estimator=estimator, budget=budget,
                       g1_hidden=5, latent=4)
    model = GPT(config).requires_grad_(False)
    for i in model.config.controlled:
        torch.nn.init.normal_(model.h[i].cheap.c_proj.weight, std=0.3)
    return model


@given(scores(), budgets)
def test_exactly_k_are_chosen_none_worse_than_the_rest_ties_to_the_earlier(s, budget):
    k = full_tokens(budget, s.size(1))
    mask = topk_mask(s, k)
    assert mask.dtype == torch.bool and mask.shape == s.shape
    for row, chosen in zip(s, mask):
        slow = sorted(range(len(row)), key=lambda t: (-row[t].item(), t))
        assert chosen.nonzero().flatten().tolist() == sorted(slow[:k])


@given(scores(), budgets)
def test_a_threshold_never_lets_more_through_than_the_budget(s, budget):
    k, above = full_tokens(budget, s.numel()), int((s > threshold_for(s, budget)).sum())
    assert above <= k
    if s.unique().numel() == s.numel() and s.isfinite().all():
        assert above == k


@given(gates, estimators, budgets, seeds, st.integers(1, 4), st.integers(1, 24),
       st.sampled_from(["topk", "threshold"]))
def test_gathered_is_masked(gate, estimator, budget, seed, B, T, mode):
    model = small_model(gate, estimator, budget, seed)
    idx, row_seeds = torch.randint(0, 31, (B, T)), torch.randint(0, 2 ** 60, (B,))
    model.calibrate(Context(idx, row_seeds))
    model.config.execution = "gathered"
    a, routes_a = model(idx, mode, row_seeds)
    model.config.execution = "masked"
    b, routes_b = model(idx, mode, row_seeds)
    if all(torch.equal(x.mask, y.mask) for x, y in zip(routes_a, routes_b)):  # rounding may flip a score
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    else:
        assert any((x.scores - y.scores).abs().max() < 1e-5 for x, y in zip(routes_a, routes_b))


@given(gates, estimators, budgets, seeds, st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_any_chunks_through_a_cache_are_the_uncached_forward(gate, estimator, budget, seed, chunks):
    T = min(24, sum(chunks))
    model = small_model(gate, estimator, budget, seed)
    idx, row_seeds = torch.randint(0, 31, (1, T)), torch.tensor([7])
    model.calibrate(Context(torch.randint(0, 31, (4, 24)), torch.arange(4)))
    whole, routes = model(idx, "threshold", row_seeds)
    cache, start, logits, masks = new_cache(model), 0, [], []
    for n in chunks:
        if start < T:
            some, some_routes = model(idx[:, start:start + n], "threshold", row_seeds, cache)
            logits.append(some)
            masks.append(torch.stack([r.mask for r in some_routes]))
            start += n
    if torch.equal(torch.cat(masks, 2), torch.stack([r.mask for r in routes])):
        torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)
    else:  # only a score that lies on its threshold may go the other way
        assert any((r.scores - model.h[r.layer].threshold).abs().min() < 1e-5 for r in routes)


# -----------------------------------------------------------------------------
# damage: whatever happens to the files of a run, a command refuses it in one line and changes nothing, or
# gives what it gives without the damage

RUN = Path("out/tiny/g3_full_aux/seed0")
BACKBONE = Path("out/tiny/backbone/seed0")
OTHERS = [Path("out/tiny/g1_full_aux/seed0"), Path("out/tiny/g3_full_aux/seed1"), BACKBONE]
FILES = ["config.json", "summary.json", "log.jsonl", "ckpt.pt"]
VALUES = [None, True, 0, -1, 2 ** 70, 1.5, float("nan"), "", "6", [], [1], {}, {"a": 1}]


def every_place(value, path=()):
    """The path of each dict entry and list item inside a value."""
    entries = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = enumerate(value)
    for key, inner in entries:
        yield (*path, key)
        yield from every_place(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def is_same(a, b):
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b


def change_value(value, rng):
    """Drop or retype one entry, or swap two of a kind, in place -> what was done."""
    places = sorted(every_place(value), key=repr)
    *path, key = rng.choice(places)
    inside, action = at(value, path), rng.choice(["drop", "retype", "swap"])
    if action == "drop":
        del inside[key]
        return f"drop {path} {key}"
    if action == "swap":
        *other_path, other = rng.choice(places)
        held = at(value, other_path)
        inside[key], held[other] = held[other], inside[key]
        return f"swap {path} {key} and {other_path} {other}"
    new = rng.choice([v for v in VALUES if not is_same(v, inside[key])])
    inside[key] = new
    return f"retype {path} {key} to {new!r}"


def damage(file, rng):
    """Do something to one file -> what it was."""
    kind = rng.choice(["cut", "bytes", "delete", "swap", "value", "value", "value", "value"])
    content = file.read_bytes()
    if kind == "cut":
        os.truncate(file, rng.randrange(len(content)))
    elif kind == "bytes":
        place = rng.randrange(len(content))
        changed = content[place] ^ (1 << rng.randrange(8))
        file.write_bytes(content[:place] + bytes([changed]) + content[place + 1:])
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = rng.choice([o for o in [RUN, *OTHERS] if o != file.parent and (o / file.name).exists()])
        shutil.copy(other / file.name, file)
        kind = f"swap with {other}"
    elif file.suffix == ".pt":
        value = torch.load(file, weights_only=True)
        kind = change_value(value, rng)
        torch.save(value, file)
    elif file.suffix == ".jsonl":
        lines = content.decode().splitlines()
        place = rng.randrange(len(lines))
        value = json.loads(lines[place])
        kind = change_value(value, rng)
        lines[place] = json.dumps(value)
        file.write_text("\n".join(lines) + "\n")
    else:
        value = json.loads(content)
        kind = change_value(value, rng)
        file.write_text(json.dumps(value))
    return f"{file}: {kind}"


COMMANDS = {
    "train": ("train", *tiny()),
    "eval_only": ("train", *tiny("--eval_only")),
    "sample": ("sample", str(RUN), "--prompt=the", "--max_new_tokens=5"),
    "new run": ("train", *tiny("--max_iters=2", "--out_dir=out/new")),
}


def outcome(command):
    """What a command gives, without what depends on the clock."""
    out = go(*COMMANDS[command])
    folder = {"train": RUN, "new run": Path("out/new")}.get(command)
    if folder is None:
        return out
    end = checkpoint_of(folder)
    end = [end[k] for k in ("model", "optimizers", "evaluations", "budgets", "step")]
    summary = {k: v for k, v in summary_of(folder).items() if k not in ("seconds", "digest")}
    return [end, log_of(folder), json.dumps(summary)]


@pytest.fixture(scope="module")
def undamaged(templates, tmp_path_factory):
    """{state: (a folder with runs, {command: its outcome})} of a finished and an interrupted run."""
    root, states = tmp_path_factory.mktemp("undamaged"), {}
    with pytest.MonkeyPatch.context() as m:
        shutil.copytree(templates / "done", root / "finished")
        m.chdir(root / "finished")
        go("train", *tiny("--seed=1"))
        m.chdir(root)
        shutil.copytree("finished", "interrupted")
        m.chdir(root / "interrupted")
        interrupt(m)
        for state in ("finished", "interrupted"):
            states[state] = root / state, {}
            for command in COMMANDS:
                shutil.copytree(root / state, root / "once")
                m.chdir(root / "once")
                states[state][1][command] = outcome(command)
                m.chdir(root)
                shutil.rmtree("once")
    return states


def interrupt(m):
    """The run RUN as it is after a crash at step 5."""
    import train
    real = train.get_batch

    def crash(data, config, step, micro, machine):
        if step == 5:
            raise KeyboardInterrupt
        return real(data, config, step, micro, machine)
    with m.context() as inner:
        inner.setattr(train, "get_batch", crash)
        with pytest.raises(KeyboardInterrupt):
            go("train", *tiny("--overwrite"))


def test_damage_is_refused_in_one_line_or_changes_nothing_that_comes_out(undamaged, tmp_path, monkeypatch,
                                                                         request):
    refused = 0
    mutations = request.config.getoption("mutations")
    for number in range(mutations):
        rng = random.Random(number)
        state = rng.choice(sorted(undamaged))
        template, expected = undamaged[state]
        place = tmp_path / str(number)
        shutil.copytree(template, place)
        monkeypatch.chdir(place)
        file = rng.choice([RUN, RUN, RUN, BACKBONE]) / rng.choice(FILES)
        command = rng.choice(sorted(COMMANDS))
        if not file.exists():
            continue
        what = f"mutation {number}: {state}, {damage(file, rng)}, then {command}"
        before = snapshot()
        try:
            came_out = outcome(command)
        except ConfigError as error:
            refused += 1
            assert str(error) and "\n" not in str(error), what
            assert snapshot() == before, what
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        else:
            assert same(came_out, expected[command]), what
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(place)
    assert refused > mutations / 10
