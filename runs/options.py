"""Which configs are refused, each with a line that names the value and the remedy."""
import os

from configurator import ConfigError, Registry, did_you_mean
from gates import ESTIMATORS, GATES, LABELS, TARGETS, active_losses
from model import ACTIVATIONS

AT_LEAST_1 = ("n_layer", "n_head", "n_embd", "block_size", "cheap_rank", "g1_hidden", "latent", "max_iters",
              "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "final_eval_iters",
              "log_interval", "label_layers", "backbone_iters", "backbone_batch_size")
AT_LEAST_0 = ("seed", "backbone_seed", "threads", "warmup_iters", "learning_rate", "gate_lr", "muon_lr",
              "weight_decay", "grad_clip", "backbone_lr", "backbone_muon_lr")
SHARES = ("budget", "share_step", "label_share", "min_lr_ratio", "beta1", "beta2")
# Beyond these nothing that is meant can run.
LARGEST = {"n_layer": 10_000, "threads": 1_024, "n_embd": 1_000_000, "cheap_rank": 1_000_000,
           "g1_hidden": 1_000_000}
LARGEST_ELSE = 1e9
MODES = ("full", "topk", "cheap", "adapter")


def validate(config):
    """Refuse what cannot run, with a line that names the value and the remedy -> config."""
    choices = {"gate": GATES, "activation": ACTIVATIONS, "estimator": ESTIMATORS, "oracle": LABELS,
               "label_target": TARGETS, "device": ("auto", "cpu", "cuda"), "mode": MODES,
               "dtype": ("auto", "float32", "bfloat16"), "execution": ("gathered", "masked")}
    for key, names in choices.items():
        if config[key] not in names:
            hint = did_you_mean(config[key], names)
            if isinstance(names, Registry):
                hint += "; one of your own is loaded with --plugin=FILE"
            raise ConfigError(f"--{key}={config[key]!r} is unknown; {hint}")
    lambdas = tuple(key for key in config if key.startswith("lambda_"))
    for key in (*AT_LEAST_1, *AT_LEAST_0, *lambdas):
        least = 1 if key in AT_LEAST_1 else 0
        if config[key] < least:
            raise ConfigError(f"--{key}={config[key]} is too small; give {least} or more")
        largest = LARGEST.get(key, LARGEST_ELSE)
        if config[key] > largest and "seed" not in key:
            raise ConfigError(f"--{key}={config[key]} is too large; give {largest:,.0f} or less")
    for key in SHARES:
        if not 0 <= config[key] <= 1:
            raise ConfigError(f"--{key}={config[key]} is outside [0, 1]; give a share such as 0.5")
    check_shape(config)
    check_recipe(config)
    return config


def check_shape(config):
    if config["n_embd"] % config["n_head"]:
        raise ConfigError(f"--n_embd={config['n_embd']} is not a multiple of --n_head={config['n_head']}")
    if config["latent"] > config["n_embd"]:
        raise ConfigError(f"--latent={config['latent']} is larger than --n_embd={config['n_embd']}; the "
                          "target head needs latent <= n_embd")
    for key in ("scale", "recipe", "dataset"):
        if not config[key] or config[key] != os.path.basename(config[key]) or config[key].startswith("."):
            raise ConfigError(f"--{key}={config[key]!r} is not a plain name; use letters, digits and dashes")
    if config["mode"] == "full":
        return
    layers = config["controlled"]
    possible = all(type(i) is int and 0 <= i < config["n_layer"] for i in layers)
    if not layers or not possible or sorted(set(layers)) != layers:
        raise ConfigError(f"--controlled={layers}: name at least one layer of 0..{config['n_layer'] - 1}, in "
                          "ascending order")


def check_recipe(config):
    losses = active_losses(config)
    if 0 < config["share_step"] < 1 / 64:
        raise ConfigError(f"--share_step={config['share_step']} is too small; give 0, or 1/64 or more")
    if max(config["beta1"], config["beta2"]) == 1:
        raise ConfigError(f"--beta1={config['beta1']}, --beta2={config['beta2']}: AdamW takes less than 1")
    if not any(loss.needs in ("stream", "dense") for loss in losses.values()):
        raise ConfigError("no loss trains the cheap FFNs; give --lambda_lm or --lambda_distill")
    labelled = any(loss.needs == "labels" for loss in losses.values())
    learned = config["mode"] == "topk" and GATES[config["gate"]].learned
    if learned and config["estimator"] == "hard" and not labelled:
        raise ConfigError("--estimator='hard' without labels teaches the gate nothing; give --lambda_util or "
                          "--lambda_rank, or another estimator")


def check_machine(config, machine):
    """Refuse what this machine cannot run, before anything is made."""
    check_slices(config, machine)
    check_memory(config, machine)


def check_memory(config, machine):
    """A floor of what the run needs, against all the memory that there is."""
    D, rows = config["n_embd"], config["batch_size"] // machine.processes
    layers = config["n_layer"] * 12 * D ** 2
    if config["mode"] != "full":
        layers += len(config["controlled"]) * 2 * D * config["cheap_rank"]
    stream = rows * config["block_size"] * D
    starts = 16 * rows * config["gradient_accumulation_steps"]  # and seeds, of the rows
    needed = 4 * (layers + config["block_size"] * D + stream) + starts
    there_is = machine.memory()
    if needed > there_is:
        raise ConfigError(f"this run needs {gib(needed)} GiB at least ({gib(4 * layers)} for the layers, "
                          f"{gib(4 * stream)} for one stream of the batch), and this machine has "
                          f"{gib(there_is)}; give a smaller --batch_size, --block_size or model")


def gib(size):
    return f"{size / 2 ** 30:,.1f}"


def check_slices(config, machine):
    """Every slice of a batch must label a whole number of its rows."""
    labelled = any(loss.needs == "labels" for loss in active_losses(config).values())
    rows = config["batch_size"] // machine.processes
    slices = machine.processes * config["gradient_accumulation_steps"]
    if slices > 1 and labelled and rows * config["label_share"] % 1:
        raise ConfigError(f"--label_share={config['label_share']} of the {rows} rows of a slice is no whole "
                          "number; give another share or batch")
