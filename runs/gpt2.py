"""GPT-2's weights as the frozen backbone, from a Hugging Face folder or hub name."""
import json
import os

import torch

from configurator import ConfigError
from model import ACTIVATIONS


def load_gpt2(model, source):
    """Copy GPT-2's weights into `model`'s backbone, all or none: logits then equal those of `transformers`.
    Raises ConfigError when they are missing or of another shape."""
    config, path = find_gpt2(source)
    check_shape(model.config, config, source)
    weights = read_safetensors(path)
    tensors = {}
    for name, p in model.backbone().items():
        tensor = weights.get(name, torch.empty(0))
        if name.startswith("h.") and tensor.dim() == 2:
            tensor = tensor.t()  # GPT-2's Conv1D holds (in, out)
        if name == "wpe.weight":
            tensor = tensor[:p.size(0)]
        if tensor.shape != p.shape:
            raise ConfigError(f"{path}: {name} is missing or of another shape, {tuple(tensor.shape)} "
                              f"instead of {tuple(p.shape)}")
        tensors[name] = tensor
    with torch.no_grad():
        for name, p in model.backbone().items():
            p.copy_(tensors[name])


def read_safetensors(path):
    """{name: tensor}, without the prefix that models with an LM head have."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); download it again") from None


def check_shape(c, config, source):
    """Refuse a GPT-2 whose config.json contradicts the GPTConfig c; positions beyond the context may be left
    over."""
    asked = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "n_positions": c.block_size,
             "vocab_size": c.vocab_size}
    for key, value in asked.items():
        given = config.get(key)
        enough = key == "n_positions" and type(given) is int and given >= value
        if given != value and not enough:
            raise ConfigError(f"{source} is of another shape: its {key} is {given!r}, the config asks for "
                              f"{value}")
    activation = config.get("activation_function", "gelu_new")
    if activation != c.activation:
        advice = f"known are {', '.join(ACTIVATIONS)}"
        if activation in ACTIVATIONS:
            advice = f"give --activation={activation}"
        raise ConfigError(f"{source} has the nonlinearity {activation!r}, the config {c.activation!r}; "
                          f"{advice}")


def find_gpt2(source):
    """A folder or a hub name -> (its config.json as a dict, the path of its safetensors file)."""
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        try:
            source = snapshot_download(source, allow_patterns=["config.json", "model.safetensors"])
        except Exception as error:  # of the network, of the hub, of the name
            raise ConfigError(f"no folder {source!r}, and the hub did not give it ({type(error).__name__}); "
                              "name a folder with config.json and model.safetensors") from None
    try:
        with open(os.path.join(source, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}/config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{source}/config.json holds no object; it is not a model's config")
    path = os.path.join(source, "model.safetensors")
    if not os.path.isfile(path):
        raise ConfigError(f"{path} is missing; name a folder with config.json and model.safetensors")
    return config, path
