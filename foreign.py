"""Weights from elsewhere as the frozen backbone: GPT-2's and Llama's from a Hugging Face folder or the hub, and
nanoGPT's ckpt.pt. Logits then equal those of the original. What changes the function and is not supported is
refused by name, never ignored.
"""
import glob
import json
import os
import re

import torch

from configurator import ConfigError

# Keys of a config.json that change what the model computes, and the only values that are supported here.
# A key that is absent has the first of them.
SUPPORTED = {
    "gpt2": {"activation_function": ("gelu_new", "gelu", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
             "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
             "quantization_config": (None,)},
    "llama": {"hidden_act": ("silu",), "pretraining_tp": (1,), "rope_interleaved": (False,),
              "partial_rotary_factor": (1, 1.0), "sliding_window": (None,), "use_sliding_window": (False,),
              "quantization_config": (None,)},
}
# Tensors of a file that carry no weight of the model.
IGNORED = re.compile(r"(h\.\d+\.attn\.(masked_)?bias|.*rotary_emb\.inv_freq)")


def is_foreign(backbone):
    """Is this the name of a backbone from elsewhere? -> bool"""
    return backbone.startswith("hf:") or nanogpt_file(backbone) is not None


def nanogpt_file(backbone):
    """The path of nanoGPT's checkpoint: a file, or the ckpt.pt of a folder that is no run of ours."""
    if os.path.isfile(backbone):
        return backbone
    path = os.path.join(backbone, "ckpt.pt")
    if os.path.isfile(path) and not os.path.exists(os.path.join(backbone, "config.json")):
        return path
    return None


def foreign_shape(backbone):
    """The fields of GPTConfig that a backbone from elsewhere decides, block_size as its longest context."""
    if backbone.startswith("hf:"):
        folder = hugging_face_folder(backbone[3:])
        try:
            return hugging_face_shape(read_config(folder), folder)
        except KeyError as error:
            raise ConfigError(f"{folder}: config.json has no {error}") from None
    return nanogpt_shape(read_nanogpt(nanogpt_file(backbone))["model_args"])


def load_foreign(model, backbone):
    """Copy the weights of a backbone from elsewhere into the model, all or none."""
    if backbone.startswith("hf:"):
        folder = hugging_face_folder(backbone[3:])
        rename = {"gpt2": rename_gpt2, "llama": rename_llama}[read_config(folder)["model_type"]]
        weights, origin = rename(read_safetensors(folder)), folder
    else:
        origin = nanogpt_file(backbone)
        weights = {name.removeprefix("_orig_mod.").removeprefix("transformer."): w
                   for name, w in read_nanogpt(origin)["model"].items()}
    copy_weights(model, weights, origin)


def copy_weights(model, weights, origin):
    """{our name: tensor} into the model's backbone; one that is missing, left over or misshapen is refused."""
    own = model.backbone()
    if model.config.tied_head:
        weights.pop("lm_head.weight", None)  # a copy of wte
    if "wpe.weight" in weights and "wpe.weight" in own:
        weights["wpe.weight"] = weights["wpe.weight"][:len(own["wpe.weight"])]  # positions beyond block_size
    left_over = sorted(name for name in weights.keys() - own.keys() if not IGNORED.fullmatch(name))
    if left_over:
        raise ConfigError(f"{origin} has the weight {left_over[0]}, for which there is no place here: it is a "
                          "model of another function")
    for name, p in own.items():
        shape = tuple(weights[name].shape) if name in weights else "missing"
        if shape != tuple(p.shape):
            raise ConfigError(f"{origin}: {name} is {shape}, not {tuple(p.shape)}; its weights do not fit its "
                              "config")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(weights[name])


# -----------------------------------------------------------------------------
# Hugging Face

def hugging_face_folder(name):
    """A folder, or a name on the hub -> a folder with config.json and safetensors."""
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:  # of the network, of the hub, of the name
        raise ConfigError(f"hf:{name} is no folder, and the hub did not give it ({type(error).__name__}); name "
                          "a folder with config.json and model.safetensors") from None


def read_config(folder):
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            config = json.load(f)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); name the folder of a model") from None
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise ConfigError(f"{path}: model_type is {kind!r}; supported are {', '.join(SUPPORTED)}")
    return config


def hugging_face_shape(config, folder):
    """config.json -> fields of GPTConfig. Raises ConfigError for what is not supported."""
    kind = config["model_type"]
    for key, values in SUPPORTED[kind].items():
        given = config.get(key, values[0])
        if given not in values:
            raise ConfigError(f"{folder}: {key}={given!r} is not supported; supported: "
                              f"{', '.join(map(repr, values))}")
    if kind == "gpt2":
        exact = config.get("activation_function", "gelu_new") == "gelu"
        return dict(n_layer=config["n_layer"], n_head=config["n_head"], n_embd=config["n_embd"],
                    n_inner=config.get("n_inner") or 4 * config["n_embd"], n_kv_head=config["n_head"],
                    vocab_size=config["vocab_size"], block_size=config["n_positions"],
                    activation="gelu" if exact else "gelu_new", norm="layernorm",
                    norm_eps=config.get("layer_norm_epsilon", 1e-5), positions="learned", bias=True,
                    tied_head=config.get("tie_word_embeddings", True))
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or width // heads
    if head_dim * heads != width:
        raise ConfigError(f"{folder}: head_dim={head_dim} with {heads} heads is not hidden_size={width}, which "
                          "is not supported")
    biases = config.get("attention_bias", False), config.get("mlp_bias", False)
    if biases[0] != biases[1]:
        raise ConfigError(f"{folder}: attention_bias={biases[0]} with mlp_bias={biases[1]} is not supported; "
                          "both or none")
    return dict(n_layer=config["num_hidden_layers"], n_head=heads, n_embd=width,
                n_kv_head=config.get("num_key_value_heads") or heads, n_inner=config["intermediate_size"],
                vocab_size=config["vocab_size"], block_size=config.get("max_position_embeddings", 2048),
                activation="swiglu", norm="rmsnorm", norm_eps=config.get("rms_norm_eps", 1e-6),
                positions="rotary", rope_theta=rope_theta(config, folder), bias=biases[0],
                tied_head=config.get("tie_word_embeddings", False))


def rope_theta(config, folder):
    """The base of the rotary angles; other kinds of rotary positions are refused."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{folder}: rope_type={kind!r} is not supported; supported: 'default'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(f"{folder}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def read_safetensors(folder):
    """{name: tensor} of model.safetensors, or of all its shards."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    paths = [os.path.join(folder, "model.safetensors")]
    if not os.path.exists(paths[0]):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "model-*-of-*.safetensors")))
    if not paths:
        raise ConfigError(f"{folder} has no model.safetensors; name a folder with the weights in that format")
    weights = {}
    for path in paths:
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); download it again") from None
    return weights


def rename_gpt2(weights):
    """GPT-2's names are ours; its linear maps are Conv1D, which holds (in, out)."""
    renamed = {}
    for name, w in weights.items():
        name = name.removeprefix("transformer.")
        linear = name.startswith("h.") and name.endswith(".weight") and w.dim() == 2
        renamed[name] = w.t() if linear else w
    return renamed


def rename_llama(weights):
    """Llama's names -> ours. Its q, k and v become one product, and so do the FFN's gate and value."""
    names = {"embed_tokens": "wte", "norm": "ln_f", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
             "self_attn.o_proj": "attn.c_proj", "mlp.down_proj": "mlp.c_proj"}
    joined = {"attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
              "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj")}
    part_of = {part: whole for whole, parts in joined.items() for part in parts}
    renamed, pieces = {}, {}
    for name, w in weights.items():
        layer, module, kind = re.fullmatch(r"(?:model\.)?(layers\.\d+\.)?(.*?)\.([^.]+)", name).groups()
        layer = (layer or "").replace("layers.", "h.")
        if module in part_of:
            pieces.setdefault((f"{layer}{part_of[module]}.{kind}", part_of[module]), {})[module] = w
        else:
            renamed[f"{layer}{names.get(module, module)}.{kind}"] = w
    for (name, whole), parts in pieces.items():
        renamed[name] = torch.cat([parts[part] for part in joined[whole] if part in parts])
    return renamed


# -----------------------------------------------------------------------------
# nanoGPT

def read_nanogpt(path):
    """nanoGPT's checkpoint as a dict. A pickle with code in it is refused, never executed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_args"], checkpoint["model"]
    except Exception as error:  # of zip files, of pickles, of what they hold
        raise ConfigError(f"{path} is no checkpoint of nanoGPT ({type(error).__name__})") from None
    return checkpoint


def nanogpt_shape(args):
    return dict(n_layer=args["n_layer"], n_head=args["n_head"], n_embd=args["n_embd"], n_kv_head=args["n_head"],
                n_inner=4 * args["n_embd"], vocab_size=args["vocab_size"], block_size=args["block_size"],
                activation="gelu", norm="layernorm", norm_eps=1e-5, positions="learned", bias=args["bias"],
                tied_head=True)
