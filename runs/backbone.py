"""The frozen backbone: what it is, which run makes it, and how it gets into a model."""
import hashlib
import json
import os

import torch

from configurator import HERE, ConfigError, did_you_mean, read_file
from runs.files import weights_hash
from runs.folder import BACKBONE_KEYS, read_run, whose
from runs.gpt2 import load_gpt2
from runs.options import validate


def run_folder(config):
    name = os.path.join("out", config["scale"], config["recipe"], f"seed{config['seed']}")
    return config["out_dir"] or name


def identity(config, meta):
    """What a backbone is: a hash of the keys that it depends on and of its data."""
    facts = {key: config[key] for key in BACKBONE_KEYS}
    facts |= {split: meta["splits"][split]["sha256"] for split in ("train", "val")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def backbone_config(config, defaults):
    """The config of the run that makes this run's backbone; None where --backbone is a folder or a GPT-2."""
    name = config["backbone"]
    if os.path.isdir(name) or name.startswith("hf:"):
        return None
    path = os.path.join(HERE, "config", f"{name}.py")
    if not os.path.exists(path):
        raise ConfigError(f"--backbone={name!r} is no recipe, no folder of a run, and does not start with "
                          "hf:; " + did_you_mean(name, ["backbone", "backbone_long"]))
    inherited = ("scale", "dataset", "n_layer", "n_head", "n_embd", "block_size", "activation",
                 "backbone_iters", "backbone_lr", "backbone_muon_lr", "backbone_batch_size", "eval_iters",
                 "final_eval_iters", "log_interval", "device", "dtype", "threads", "compile")
    base = defaults | {key: config[key] for key in inherited}
    return validate(read_file(path, base, defaults) | {"seed": config["backbone_seed"]})


def backbone_folder(dense, meta):
    """Where the backbone of this config is, or will be: two that differ lie side by side."""
    folder = run_folder(dense)
    held = whose(folder)
    if held is None or held.get("identity") == identity(dense, meta):
        return folder
    return f"{folder}-{identity(dense, meta)}"


def load_backbone(model, folder, machine):
    """Copy the backbone into the model and freeze it -> {path, identity, weights}."""
    if folder.startswith("hf:"):
        load_gpt2(model, folder[3:])
        facts = {"path": folder, "identity": folder}
    else:
        checkpoint = read_run(folder)
        for key in ("n_layer", "n_head", "n_embd", "block_size", "activation"):
            held, asked = checkpoint["config"].get(key), getattr(model.config, key)
            if held != asked:
                raise ConfigError(f"the backbone in {folder} has --{key}={held}, not {asked}; give "
                                  f"--{key}={held}")
        load_weights(model, checkpoint["model"], folder, needed=model.backbone())
        facts = {"path": folder, "identity": checkpoint["identity"]}
    facts["weights"] = weights_hash(model.backbone())
    freeze(model, machine)
    return facts


def freeze(model, machine):
    """No gradient for the backbone, and its weights in the compute dtype."""
    for p in model.backbone().values():
        p.requires_grad_(False)
    cast_frozen(model, machine)


def cast_frozen(model, machine):
    """The matrices that nothing trains, in the compute dtype: autocast would cast them at every use."""
    for name, p in model.named_parameters():
        matrix = ".c_" in name or name.startswith("wte")
        if matrix and machine.dtype == torch.bfloat16 and not p.requires_grad:
            p.data = p.data.to(torch.bfloat16)


def load_weights(model, weights, path, needed):
    """Copy named tensors into the model, all or none; every name in `needed` must be among them."""
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or not isinstance(tensor, torch.Tensor) or own[name].shape != tensor.shape:
            shape = tuple(getattr(tensor, "shape", ()))
            raise ConfigError(f"{path} is of another shape ({name} {shape} does not fit); use the config "
                              "that it was trained with")
    for name in needed:
        if name not in weights:
            raise ConfigError(f"{path} is of another shape ({name} is missing); use the config that it was "
                              "trained with")
    model.load_state_dict(weights, strict=False)
