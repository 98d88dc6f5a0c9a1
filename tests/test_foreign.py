"""Backbones from elsewhere: their logits are the original's, and what computes another function is refused by
its name."""
import functools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configurator import ConfigError
from conftest import go, losses_of, recipe, summary_of, tiny
from foreign import foreign_shape, load_foreign
from model import GPT, GPTConfig
from prepare import eval_batch, load_data
from train import configure_run

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402  (it comes with transformers)

GPT2 = dict(n_layer=3, n_head=4, n_embd=32, n_positions=24, vocab_size=61)
LLAMA = dict(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
             intermediate_size=56, max_position_embeddings=24, vocab_size=61)


def stirred(model):
    """The model with weights, biases and norms away from their initial values, so that each one counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model.eval()


def original(kind, base=False, **changes):
    """A tiny random model of `transformers`; base: without its LM head."""
    if kind == "gpt2":
        config = transformers.GPT2Config(**GPT2 | changes)
        make = transformers.GPT2Model if base else transformers.GPT2LMHeadModel
    else:
        config = transformers.LlamaConfig(**LLAMA | changes)
        make = transformers.LlamaModel if base else transformers.LlamaForCausalLM
    return stirred(make._from_config(config, attn_implementation="eager"))


def ours(backbone, **changes):
    """A plain dense model with the shape and the weights of a backbone from elsewhere."""
    model = GPT(GPTConfig(**foreign_shape(backbone) | changes))
    load_foreign(model, backbone)
    return model


def check_logits(backbone, reference, vocab_size=61, **changes):
    """Ours equal those of reference(ids), to 1e-4."""
    model = ours(backbone, **changes)
    ids = torch.randint(vocab_size, (2, model.config.block_size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, logits = reference(ids), model(ids)[0]
    assert wanted.std() > 0.3  # a comparison that could fail
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


# -----------------------------------------------------------------------------
# the same logits as transformers

SAME = [
    ("gpt2", {}), ("gpt2", dict(activation_function="gelu")), ("gpt2", dict(layer_norm_epsilon=0.05)),
    ("gpt2", dict(n_inner=40)), ("gpt2", dict(tie_word_embeddings=False)), ("gpt2", dict(n_head=1)),
    ("gpt2", dict(activation_function="gelu_pytorch_tanh", n_inner=96, tie_word_embeddings=False)),
    ("llama", {}), ("llama", dict(num_key_value_heads=4)), ("llama", dict(num_key_value_heads=1)),
    ("llama", dict(rope_parameters={"rope_type": "default", "rope_theta": 300.0})),
    ("llama", dict(rms_norm_eps=0.05)), ("llama", dict(attention_bias=True, mlp_bias=True)),
    ("llama", dict(tie_word_embeddings=True)), ("llama", dict(num_attention_heads=2, num_key_value_heads=1)),
    ("llama", dict(num_hidden_layers=1, tie_word_embeddings=True, num_key_value_heads=1, attention_bias=True,
                   mlp_bias=True, intermediate_size=32)),
]


@pytest.mark.parametrize("kind, changes", SAME, ids=str)
def test_logits_are_those_of_transformers(kind, changes, tmp_path):
    model = original(kind, **changes)
    model.save_pretrained(tmp_path)
    check_logits(f"hf:{tmp_path}", lambda ids: model(ids).logits)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_checkpoint_in_shards_read_with_a_shorter_context_than_its_own(kind, tmp_path):
    model = original(kind)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_logits(f"hf:{tmp_path}", lambda ids: model(ids).logits, block_size=10)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_checkpoint_without_an_lm_head_has_the_tied_one(kind, tmp_path):
    model = original(kind, base=True, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight
    check_logits(f"hf:{tmp_path}", lambda ids: model(ids).last_hidden_state @ embedding.T)


def test_weights_in_bfloat16_are_read_as_they_are(tmp_path):
    model = original("llama")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    model.save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({n: w.bfloat16() for n, w in weights.items()}))
    check_logits(f"hf:{tmp_path}", lambda ids: model(ids).logits)


@pytest.mark.parametrize("old", [dict(rope_theta=300.0), dict(rope_theta=300.0, rope_scaling=None),
                                 dict(rope_scaling={"rope_type": "default", "rope_theta": 300.0})], ids=str)
def test_the_rope_keys_of_older_configs(old, tmp_path):
    model = original("llama", rope_parameters={"rope_type": "default", "rope_theta": 300.0})
    model.save_pretrained(tmp_path)
    change_config(tmp_path, "rope_parameters")
    change_config(tmp_path, **old)
    check_logits(f"hf:{tmp_path}", lambda ids: model(ids).logits)


def change_config(folder, *gone, **changes):
    path = Path(folder) / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in gone}
    path.write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = load_file(Path(folder) / "model.safetensors")
    change(weights)
    save_file(weights, Path(folder) / "model.safetensors")


# -----------------------------------------------------------------------------
# refused by name

REFUSED = [
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
    ("gpt2", dict(activation_function="relu"), "activation_function='relu'"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True"),
    ("gpt2", dict(quantization_config={"bits": 4}), "quantization_config"),
    ("llama", dict(rope_parameters={"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}), "'llama3'"),
    ("llama", dict(rope_parameters=None, rope_scaling={"rope_type": "llama3", "factor": 8.0}), "'llama3'"),
    ("llama", dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "'linear'"),
    ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    ("llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    ("llama", dict(head_dim=16), "head_dim=16"),
    ("llama", dict(attention_bias=True), "attention_bias=True"),
    ("llama", dict(mlp_bias=True), "mlp_bias=True"),
    ("llama", dict(sliding_window=4096), "sliding_window=4096"),
    ("llama", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("llama", dict(pretraining_tp=2), "pretraining_tp=2"),
    ("llama", dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    ("llama", dict(model_type="mistral"), "'mistral'"),
    ("llama", dict(model_type="qwen2"), "'qwen2'"),
    ("llama", dict(model_type=None), "None"),
]


@pytest.mark.parametrize("kind, changes, named", REFUSED, ids=str)
def test_what_computes_another_function_is_refused_by_name(kind, changes, named, tmp_path):
    original(kind).save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        ours(f"hf:{tmp_path}")
    assert named in str(error.value) and "supported" in str(error.value) and "\n" not in str(error.value)


LAYER = "model.layers.1."


@pytest.mark.parametrize("name, shape, named", [
    (f"{LAYER}self_attn.q_norm.weight", (8,), "h.1.self_attn.q_norm.weight, for which there is no place"),
    (f"{LAYER}mlp.down_proj.weight", None, "h.1.mlp.c_proj.weight is missing"),
    (f"{LAYER}self_attn.k_proj.weight", None, "h.1.attn.c_attn.weight is"),
    (f"{LAYER}mlp.up_proj.weight", (40, 32), "h.1.mlp.c_fc.weight is"),
    ("model.norm.weight", (16,), "ln_f.weight is")])
def test_weights_that_do_not_fit_are_refused_and_none_is_copied(name, shape, named, tmp_path):
    original("llama").save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.pop(name, None))
    if shape:
        change_weights(tmp_path, lambda weights: weights.update({name: torch.ones(shape)}))
    model = GPT(GPTConfig(**foreign_shape(f"hf:{tmp_path}")))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=named):
        load_foreign(model, f"hf:{tmp_path}")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_untied_head_that_is_missing_is_refused(tmp_path):
    original("gpt2", base=True, tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="lm_head.weight is missing"):
        ours(f"hf:{tmp_path}")


@pytest.mark.parametrize("file, content, named", [
    ("config.json", b"{", "config.json cannot be read"), ("config.json", None, "config.json cannot be read"),
    ("config.json", b'{"model_type": "gpt2"}', "config.json has no 'n_layer'"),
    ("model.safetensors", b"short", "cannot be read"),
    ("model.safetensors", None, "has no model.safetensors")])
def test_files_that_are_broken_or_missing(file, content, named, tmp_path):
    original("gpt2").save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        ours(f"hf:{tmp_path}")


def test_a_name_that_neither_disk_nor_hub_knows(monkeypatch):
    def offline(*words, **options):
        raise OSError("offline")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match="hf:no/such.*name a folder"):
        ours("hf:no/such")


# -----------------------------------------------------------------------------
# the command line and the backbone's config

def test_the_shape_comes_from_the_backbone_and_what_contradicts_it_is_refused(tmp_path):
    original("llama").save_pretrained(tmp_path)
    words = [f"--backbone=hf:{tmp_path}", "--latent=8", "--block_size=16"]
    config, _, _ = configure_run(words)
    assert config["controlled"] == [1]  # of 3 layers all but the first and the last
    assert configure_run([*words, "--controlled=[]"])[0]["controlled"] == [1]
    assert configure_run([*words, "--controlled=[0,2]"])[0]["controlled"] == [0, 2]
    assert (config["n_layer"], config["n_kv_head"], config["n_inner"], config["block_size"]) == (3, 2, 56, 16)
    assert (config["activation"], config["positions"], config["tied_head"]) == ("swiglu", "rotary", False)
    configure_run([*words, "--n_layer=3"])  # it may be said again
    with pytest.raises(ConfigError, match="--n_layer=5, but .* has 3"):
        configure_run([*words, "--n_layer=5"])
    with pytest.raises(ConfigError, match="--block_size=25, but .* has 24"):
        configure_run([*words[:2], "--block_size=25"])


def words_for(backbone, *words):
    """The words of a tiny run on a backbone from elsewhere: none of its shape."""
    words = tiny(f"--backbone={backbone}", *words)
    return [word for word in words if not word.startswith(("--n_layer", "--n_head", "--n_embd"))]


@pytest.mark.parametrize("name", ["best", "g3_full_aux"])
def test_a_run_on_a_llama_trains_evaluates_and_is_read_again(name, place):
    model = original("llama", vocab_size=264)  # padded: the text has 257 ids
    model.save_pretrained("llama")
    words = [recipe(name), *words_for("hf:llama", "--controlled=[]", "--max_iters=2")]
    go("train", *words)
    run = f"out/tiny/{name}/seed0"
    summary, losses = summary_of(run), losses_of(run)
    assert summary["backbone"]["path"] == f"hf:{Path('llama').resolve()}" and len(losses) == 2
    result = json.loads(go("train", *words, "--eval_only").splitlines()[-1])
    assert result["val"] == summary["val"]
    # The dense model beside it is the original.
    batch = eval_batch(load_data("tiny", 16)[0]["val"], {"block_size": 16, "batch_size": 4}, 8)
    with torch.no_grad():
        logits = model(batch.tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    assert summary["val"]["full"]["loss"] == pytest.approx(loss, abs=1e-4)


def test_text_in_another_vocabulary_than_the_backbones_is_refused(place):
    original("llama", vocab_size=61).save_pretrained("llama")
    with pytest.raises(ConfigError, match="257 ids.*the backbone has 61.*--tokenizer"):
        go("train", *words_for("hf:llama"))


# -----------------------------------------------------------------------------
# nanoGPT

def nanogpt_weights(bias, vocab_size):
    """A state_dict with nanoGPT's names, of 2 layers of width 16."""
    generator, D = torch.Generator().manual_seed(0), 16
    random = functools.partial(torch.randn, generator=generator)
    weights = {"wte.weight": random(vocab_size, D) * 0.5, "wpe.weight": random(20, D) * 0.5}
    for prefix in ("h.0.", "h.1."):
        for name, shape in (("attn.c_attn", (3 * D, D)), ("attn.c_proj", (D, D)), ("mlp.c_fc", (4 * D, D)),
                            ("mlp.c_proj", (D, 4 * D))):
            weights[f"{prefix}{name}.weight"] = random(shape) * 0.3
            weights[f"{prefix}{name}.bias"] = random(shape[0]) * 0.3
    for name in ("h.0.ln_1", "h.0.ln_2", "h.1.ln_1", "h.1.ln_2", "ln_f"):
        weights[f"{name}.weight"] = 1 + random(D) * 0.3
        weights[f"{name}.bias"] = random(D) * 0.3
    if not bias:
        weights = {name: w for name, w in weights.items() if not name.endswith("bias")}
    weights = {f"transformer.{name}": w for name, w in weights.items()}
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def nanogpt_logits(weights, ids, n_head=4):
    """nanoGPT's forward in plain formulas: ids (B, T) -> logits (B, T, V)."""
    def get(name):
        return weights.get(f"transformer.{name}")

    def linear(x, name):
        return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    B, T = ids.shape
    x = get("wte.weight")[ids] + get("wpe.weight")[:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for layer in ("h.0", "h.1"):
        q, k, v = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").view(B, T, 3, n_head, -1).unbind(2)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.size(-1))
        y = torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -math.inf).softmax(-1), v)
        x = x + linear(y.flatten(2), f"{layer}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")), f"{layer}.mlp.c_proj")
    return norm(x, "ln_f") @ weights["lm_head.weight"].T


def save_nanogpt(path, bias=True, vocab_size=61, compiled=False):
    """A ckpt.pt as nanoGPT's train.py writes it -> its weights."""
    weights = nanogpt_weights(bias, vocab_size)
    args = dict(n_layer=2, n_head=4, n_embd=16, block_size=20, bias=bias, vocab_size=vocab_size, dropout=0.0)
    prefix = "_orig_mod." if compiled else ""
    path.parent.mkdir(exist_ok=True)
    torch.save({"model": {prefix + name: w for name, w in weights.items()}, "optimizer": {"state": {}},
                "model_args": args, "iter_num": 5, "best_val_loss": torch.tensor(1.5),
                "config": {"dataset": "shakespeare"}}, path)
    return weights


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_nanogpt(bias, compiled, tmp_path):
    weights = save_nanogpt(tmp_path / "ckpt.pt", bias, compiled=compiled)
    for backbone in (tmp_path / "ckpt.pt", tmp_path):  # the file or its folder
        check_logits(str(backbone), functools.partial(nanogpt_logits, weights))


def test_a_run_on_nanogpts_checkpoint_with_a_padded_vocabulary(place):
    weights = save_nanogpt(place / "nano" / "ckpt.pt", bias=False, vocab_size=320)
    assert nanogpt_logits(weights, torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 320)
    go("train", *words_for("nano/ckpt.pt", "--controlled=[0,1]", "--max_iters=2"))
    assert len(losses_of("out/tiny/g3_full_aux/seed0")) == 2


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_file_that_is_no_checkpoint_of_nanogpt(content, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="no checkpoint of nanoGPT"):
        ours(str(tmp_path / "ckpt.pt"))
