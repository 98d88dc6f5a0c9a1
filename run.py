"""One run: what its config may say, its frozen backbone, its folder, its checkpoint.

A run's folder holds config.json (what was asked for), log.jsonl (what happened), ckpt.pt (where it stands) and,
when it is finished, summary.json. The same command goes on from the checkpoint. A folder holds one run: another
config is refused with the keys that differ, another process by a lock.
"""
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import warnings
from dataclasses import dataclass, field

import torch
from filelock import FileLock, Timeout

from configurator import HERE, PLUGINS, ConfigError, did_you_mean, load_plugin, read_file, where_is
from foreign import foreign_shape, is_foreign, load_foreign
from gates import ESTIMATORS, GATES, LABELS, active_losses
from machine import Machine
from metrics import calibrate
from model import ACTIVATIONS, GPT, GPTConfig
from optim import make_optimizers
from prepare import eval_batch, load_data, prepare

# Keys that change no number of a run. All others decide what is the same run, and a key that is absent has its
# default, so a key that a fork adds counts too. The data and the backbone count by their hashes, not their names.
NO_NUMBER = {"overwrite", "eval_only", "log_interval", "eval_interval", "keep_checkpoints", "threads", "out_dir",
             "dataset", "backbone"}
# Keys that no dense model reads. All others, those of config/backbone.py before them, decide what is the same
# backbone.
CONTROLLERS_ONLY = {"controlled", "cheap_rank", "cheap_start", "gate", "g1_hidden", "latent", "estimator",
                    "execution", "budget", "budget_fall", "layer_spread", "oracle", "label_target", "label_layers",
                    "label_share", "gate_lr", "backbone_seed", "backbone_iters", "backbone_long_iters",
                    "backbone_lr", "backbone_muon_lr", "backbone_batch_size"}
# The files that decide what a training computes.
METHOD = ("kernels.py", "gates.py", "model.py", "encoding.py", "prepare.py", "optim.py", "run.py", "train.py")


# -----------------------------------------------------------------------------
# what a config may say

AT_LEAST_1 = ("n_layer", "n_head", "n_embd", "block_size", "cheap_rank", "g1_hidden", "latent", "max_iters",
              "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "final_eval_iters",
              "log_interval", "label_layers", "backbone_iters", "backbone_long_iters", "backbone_batch_size")
AT_LEAST_0 = ("seed", "backbone_seed", "threads", "warmup_iters", "learning_rate", "gate_lr", "muon_lr",
              "weight_decay", "grad_clip", "backbone_lr", "backbone_muon_lr", "n_kv_head", "n_inner", "vocab_size")
SHARES = ("budget", "budget_fall", "layer_spread", "label_share", "min_lr_ratio", "beta1", "beta2")
CHOICES = {"activation": ACTIVATIONS, "label_target": ("next", "dense"), "mode": ("full", "topk", "cheap", "adapter"),
           "cheap_start": ("zero", "fitted"), "norm": ("layernorm", "rmsnorm"), "positions": ("learned", "rotary"),
           "device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16"),
           "execution": ("gathered", "masked")}


def check_config(config):
    """Refuse what cannot run, with a line that names the value and the remedy -> config."""
    for registry in (GATES, ESTIMATORS, LABELS):
        registry[config[registry.kind]]  # a name that it lacks is refused there
    for key, names in CHOICES.items():
        if config[key] not in names:
            raise ConfigError(f"--{key}={config[key]!r} is unknown; {did_you_mean(config[key], names)}")
    lambdas = [key for key in config if key.startswith("lambda_")]
    for key in (*AT_LEAST_1, *AT_LEAST_0, *lambdas):
        least = 1 if key in AT_LEAST_1 else 0
        if config[key] < least:
            raise ConfigError(f"--{key}={config[key]} is too small; give {least} or more")
    for key in SHARES:
        if not 0 <= config[key] <= 1:
            raise ConfigError(f"--{key}={config[key]} is outside [0, 1]; give a share such as 0.5")
    for key in ("scale", "recipe", "dataset"):
        if not config[key] or config[key] != os.path.basename(config[key]) or config[key].startswith("."):
            raise ConfigError(f"--{key}={config[key]!r} is not a plain name; use letters, digits and dashes")
    heads, keys = config["n_head"], config["n_kv_head"] or config["n_head"]
    if config["n_embd"] % heads or heads % keys:
        raise ConfigError(f"--n_embd={config['n_embd']} must be a multiple of --n_head={heads}, and that of "
                          f"--n_kv_head={keys}")
    if config["mode"] != "full":
        check_controllers(config)
    return config


def check_controllers(config):
    layers = config["controlled"]
    possible = all(type(i) is int and 0 <= i < config["n_layer"] for i in layers)
    if not layers or not possible or sorted(set(layers)) != layers:
        raise ConfigError(f"--controlled={layers}: name at least one layer of 0..{config['n_layer'] - 1}, in "
                          "ascending order")
    if config["latent"] > config["n_embd"]:
        raise ConfigError(f"--latent={config['latent']} is larger than --n_embd={config['n_embd']}; the target "
                          "head needs latent <= n_embd")
    if config["mode"] == "adapter" and config["cheap_start"] == "fitted":
        raise ConfigError("--cheap_start='fitted' with --mode='adapter' would add two full FFNs up; leave it out")
    if config["gate"] == "static" and config["layer_spread"]:
        raise ConfigError("--gate='static' makes whole layers full; leave --layer_spread out")
    losses = active_losses(config)
    if not any(loss.needs in ("x", "dense_x") for loss in losses.values()):
        raise ConfigError("no loss trains the cheap FFNs; give --lambda_lm or --lambda_distill")
    labelled = any(loss.needs == "labels" for loss in losses.values())
    learned = config["mode"] == "topk" and GATES[config["gate"]].learned
    if learned and config["estimator"] == "hard" and not labelled:
        raise ConfigError("--estimator='hard' without labels teaches the gate nothing; give --lambda_util or "
                          "--lambda_rank, or another estimator")


def check_first_step(trace, losses, values):
    """What a gate, a label or a loss gave at the first step: it is named with its file where it cannot teach.
    losses {name: Loss}, values {name: what it returned}."""
    gate = GATES[trace.config["gate"]]
    for route in trace.routes:
        if gate.learned and not route.scores.requires_grad:
            raise ConfigError(f"the scores of the gate {trace.config['gate']!r} ({where_is(gate)}) carry no "
                              "gradient; mend its forward, or say learned = False in the class")
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) or value.dim() or not value.requires_grad:
            got = type(value).__name__
            if isinstance(value, torch.Tensor):
                got = f"a tensor of shape {tuple(value.shape)}" + (", detached" * (not value.requires_grad))
            raise ConfigError(f"the loss {name!r} ({where_is(type(losses[name]))}) must return a scalar tensor with "
                              f"a gradient, not {got}")


def check_finite(trace, losses, step):
    """Raises ConfigError that says what is not finite and where, before it is stepped on."""
    if all(value.isfinite() for value in losses.values()):
        return
    parts = [(f"the score of the gate of layer {r.layer}", r.scores) for r in trace.routes]
    parts += [(f"the label of layer {label.layer}", label.raw) for label in trace.labels]
    parts += [("the dense model's last hidden state", trace.dense_x), ("the last hidden state", trace.x)]
    parts += [(f"the {name} loss", value) for name, value in losses.items()]
    refuse_not_finite(trace.model, parts, step)


def check_finite_evaluation(model, results, step):
    """The same of an evaluation, before it is logged and saved."""
    parts = [(f"the val loss under {mode}", torch.tensor(result["loss"])) for mode, result in results.items()]
    if not all(value.isfinite() for _, value in parts):
        refuse_not_finite(model, parts, step)


def check_finite_weights(model):
    """The same of the weights, before the first step."""
    if not all(p.isfinite().all() for p in model.parameters()):
        refuse_not_finite(model, [], 0)


def refuse_not_finite(model, parts, step):
    """Name the first weight, or else the first of parts [(name, tensor or None)], that is not finite."""
    parts = [(f"the weight {name}", p) for name, p in model.named_parameters()] + parts
    what = next(name for name, value in parts if value is not None and not value.isfinite().all())
    advice = "; the last checkpoint is kept. Give a lower --learning_rate or --gate_lr, and --overwrite"
    raise ConfigError(f"step {step}: {what} is not finite" + (advice if step else ""))


# -----------------------------------------------------------------------------
# the model and its frozen backbone

def run_folder(config):
    name = os.path.join("out", config["scale"], config["recipe"], f"seed{config['seed']}")
    return config["out_dir"] or name


def build(config, vocab_size, machine):
    """A model for this config, freshly initialised as a function of the seed."""
    torch.manual_seed(config["seed"])
    return GPT(model_config(config, vocab_size)).to(machine.device)


def model_config(config, vocab_size):
    fields = {key: config[key] for key in GPTConfig.__dataclass_fields__ if key in config}
    fields["controlled"] = () if config["mode"] == "full" else tuple(config["controlled"])
    return GPTConfig(**fields | {"vocab_size": config["vocab_size"] or vocab_size})


def fill_in_shape(config, given):
    """Take the model's shape from the backbone, where that comes from elsewhere; what was given and contradicts
    it is refused. An empty `controlled` becomes all layers but the first and the last."""
    config = dict(config)
    if config["mode"] != "full" and is_foreign(config["backbone"]):
        if "controlled" not in given:
            config["controlled"] = []
        for key, value in foreign_shape(config["backbone"]).items():
            if key == "block_size":
                if config[key] > value:
                    raise ConfigError(f"--block_size={config[key]}, but {config['backbone']} has {value} "
                                      "positions; give fewer")
            elif key in given and config[key] != value:
                raise ConfigError(f"--{key}={config[key]}, but {config['backbone']} has {value}; leave it out")
            else:
                config[key] = value
    if not config["controlled"]:
        config["controlled"] = list(range(1, config["n_layer"] - 1))
    return config


def backbone_config(config, defaults):
    """The config of the run that makes this run's backbone; None where --backbone is there already: a folder of
    a run, or one from elsewhere."""
    name = config["backbone"]
    if os.path.exists(name) or name.startswith("hf:"):
        return None
    path = os.path.join(HERE, "config", f"{name}.py")
    if not os.path.exists(path):
        raise ConfigError(f"--backbone={name!r} is no recipe, no folder of a run, no checkpoint, and does not "
                          "start with hf:; " + did_you_mean(name, ["backbone", "backbone_long"]))
    own = {key for key in config if key in CONTROLLERS_ONLY or key.startswith("lambda_")}
    # The rates and lengths of the backbone are keys of their own, which the recipe of the backbone reads.
    own = {key for key in own if not key.startswith("backbone_")} | {"recipe", "out_dir", "overwrite", "eval_only"}
    base = config | {key: defaults[key] for key in own}
    dense, _ = read_file(path, base, defaults)
    return check_config({**dense, "seed": config["backbone_seed"]})


def backbone_folder(dense, meta, defaults):
    """Where the backbone of this config is, or will be: two that differ lie side by side."""
    folder = run_folder(dense)
    held, asked = read_json(os.path.join(folder, "config.json")), record_of(dense, meta, None)
    if held is None or not differences(held, asked, defaults, but={"device", "dtype", "compile", "plugin"}):
        return folder
    counted = {key: value for key, value in what_counts(dense).items() if key not in ("device", "dtype", "compile")}
    return f"{folder}-{hash_of(json.dumps([counted, asked['data']], sort_keys=True))[:8]}"


def load_backbone(model, source, machine):
    """Copy the backbone into the model and freeze it -> {path, weights: their sha256}."""
    if is_foreign(source):
        load_foreign(model, source)
    else:
        checkpoint = read_checkpoint(source)
        load_weights(model, checkpoint["model"], source, needed=model.backbone())
        say_if_other_code(checkpoint["record"], f"the backbone {source}", machine)
    facts = {"path": absolute(source), "weights": weights_hash(model.backbone())}
    for p in model.backbone().values():
        p.requires_grad_(False)
    cast_frozen(model, machine)
    return facts


def absolute(source):
    """The name of a backbone that still holds in another working folder; a name on the hub stays."""
    if not source.startswith("hf:"):
        return os.path.abspath(source)
    return f"hf:{os.path.abspath(source[3:])}" if os.path.isdir(source[3:]) else source


def cast_frozen(model, machine):
    """The matrices that nothing trains, in the compute dtype: autocast would cast them at every use."""
    for name, p in model.named_parameters():
        matrix = ".c_" in name or name.startswith(("wte", "lm_head"))
        if matrix and machine.dtype == torch.bfloat16 and not p.requires_grad:
            p.data = p.data.to(torch.bfloat16)


def load_weights(model, weights, path, needed):
    """Copy named tensors into the model, all or none; every name in `needed` must be among them."""
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ConfigError(f"{path} is of another shape ({name} {tuple(tensor.shape)} does not fit); use the "
                              "config that it was trained with")
    for name in needed:
        if name not in weights:
            raise ConfigError(f"{path} is of another shape ({name} is missing); use the config that it was "
                              "trained with")
    model.load_state_dict(weights, strict=False)


def weights_hash(params):
    """sha256 over named tensors."""
    digest = hashlib.sha256()
    for name, p in sorted(params.items()):
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# files

def write_whole(path, write):
    """Call write(path beside), then put that file under its name: it is there whole or not at all."""
    write(f"{path}.part")
    os.replace(f"{path}.part", path)


def write_text(path, text):
    def write(part):
        with open(part, "w", encoding="utf-8") as f:
            f.write(text)
    write_whole(path, write)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def read_json(path):
    """What the file holds; None where there is none."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}); start that run again with --overwrite") from None


def read_checkpoint(folder, name="ckpt.pt"):
    """The checkpoint of a run. A pickle with code in it is refused, never executed."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        raise ConfigError(f"{path} does not exist; train it first, or name a run's folder, such as "
                          "out/tiny/best/seed0")
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["record"], checkpoint["model"]
    except Exception as error:  # of zip files, of pickles, of what they hold
        raise ConfigError(f"{path} is not a checkpoint of this program ({type(error).__name__}); if it is "
                          "truncated, start the run again with --overwrite") from None
    return checkpoint


# -----------------------------------------------------------------------------
# what is the same run

def hash_of(text):
    return hashlib.sha256(text.encode()).hexdigest()


def method_hash():
    """Of the files that decide what a run computes."""
    texts = []
    for name in METHOD:
        with open(os.path.join(HERE, name), encoding="utf-8") as f:
            texts.append(f.read())
    return hash_of("\n".join(texts))[:16]


def record_of(config, meta, backbone):
    """What config.json and the checkpoint hold: the config and all else that a run depends on."""
    return {"config": config, "data": {split: facts["sha256"] for split, facts in meta["splits"].items()},
            "backbone": backbone, "plugins": {path: PLUGINS[path] for path in config["plugin"]},
            "method": method_hash(), "git_commit": git_commit(),
            "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
            "tokenizer": {key: meta[key] for key in meta if key not in ("splits", "read", "dropped")}}


def git_commit():
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip() or "not a git checkout"
    return "no git"


def what_counts(config):
    """The keys and values that make two runs the same run."""
    free = NO_NUMBER | {"plugin"}  # the plugins' texts count
    if config.get("mode") == "full":
        free = free | CONTROLLERS_ONLY | {key for key in config if key.startswith("lambda_")}
    return {key: value for key, value in config.items() if key not in free}


def differences(held, asked, defaults, but=()):
    """What is held in place of what is asked for, as words. Keys in `but` do not count."""
    config, wanted = defaults | held["config"], defaults | asked["config"]
    keys = (what_counts(wanted).keys() | what_counts(config).keys()) - set(but)
    first = ("mode", "recipe", "seed")  # what a reader wants to be told first
    words = [f"{key} (there {config.get(key)!r}, here {wanted.get(key)!r})"
             for key in sorted(keys, key=lambda key: (key not in first, key))
             if config.get(key) != wanted.get(key)]
    for split, value in asked.get("data", {}).items():
        if held["data"].get(split) != value:
            words.append(f"the {split} text")
    if held.get("backbone") and asked.get("backbone"):
        if held["backbone"]["weights"] != asked["backbone"]["weights"]:
            words.append(f"the backbone's weights (there those of {held['backbone']['path']})")
    if "plugin" not in but and sorted(held["plugins"].values()) != sorted(asked.get("plugins", {}).values()):
        words.append("the plugin's text")
    return words


def refuse_differences(where, held, asked, defaults, but=()):
    changed = differences(held, asked, defaults, but)
    if changed:
        raise ConfigError(f"{where} holds a run with another config: {', '.join(changed[:4])}; give this one another "
                          "--recipe, --seed or --out_dir, or replace that one with --overwrite")


def say_if_other_code(record, what, machine):
    if record["method"] != method_hash():
        machine.print(f"note: {what} was made by other code ({', '.join(METHOD)} have changed since)")


# -----------------------------------------------------------------------------
# a run

@dataclass
class Run:
    """What a training reads and where it stands."""
    config: dict
    machine: Machine
    folder: str
    record: dict
    data: dict
    model: GPT
    losses: dict = field(default_factory=dict)
    trained: list = field(default_factory=list)
    optimizers: list = field(default_factory=list)
    frozen: dict = field(default_factory=dict)
    frozen_hash: str = ""
    step: int = 0
    seconds: float = 0.0
    evaluations: list = field(default_factory=list)  # {"step", mode: {"loss", ...}}
    machines: list = field(default_factory=list)
    layer_order: list | None = None  # by what they are worth, the most first; None: not weighed
    log: object = None
    lock: object = None
    summary: dict | None = None  # of a run that is finished already

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, record):
        """One record of log.jsonl."""
        if self.machine.main:
            self.log.write(json.dumps(record) + "\n")
            self.log.flush()


def open_data(config, machine):
    """({split: token ids}, meta); the embedded text is made on first use."""
    folder = os.path.join("data", "stdlib")
    if config["dataset"] == "stdlib" and not os.path.isdir(folder):
        machine.print(f"no {folder} yet: making it from the English inside CPython")
        os.makedirs("data", exist_ok=True)
        with FileLock(f"{folder}.lock"):  # of several processes one makes it
            if not os.path.isdir(folder):
                prepare()
    data, meta = load_data(config["dataset"], config["block_size"])
    spare = config["vocab_size"] - meta["vocab_size"]
    if config["vocab_size"] and not 0 <= spare < 1024:  # a padded vocabulary has a few ids to spare
        raise ConfigError(f"data/{config['dataset']} was made with {meta['tokenizer']} ({meta['vocab_size']} ids), and "
                          f"the backbone has {config['vocab_size']}; make it with the backbone's own: python "
                          "prepare.py --tokenizer=hf:NAME_OR_FOLDER --source=... --name=...")
    return data, meta


def refuse_taken_folder(config, meta, defaults):
    """Before a backbone is trained for it: is the folder another run's, as far as config and text tell?"""
    held = read_json(os.path.join(run_folder(config), "config.json"))
    if held and not config["overwrite"]:
        refuse_differences(run_folder(config), held, record_of(config, meta, None), defaults)


def open_run(config, defaults, machine, backbone=None):
    """A Run that stands where it was left; one that is finished already has its summary.

    backbone: the folder of a finished one or one from elsewhere, None for a run that makes one. Raises
    ConfigError, and then nothing in the folder has changed."""
    folder = run_folder(config)
    data, meta = open_data(config, machine)
    model = build(config, meta["vocab_size"], machine)
    facts = load_backbone(model, backbone, machine) if backbone else None
    run = Run(config, machine, folder, record_of(config, meta, facts), data, model)
    if config["overwrite"] and backbone and os.path.abspath(folder) == facts["path"]:
        raise ConfigError(f"{folder} holds the backbone of this run; choose another --out_dir")
    held = read_json(run.path("config.json"))
    if held and not config["overwrite"]:
        refuse_differences(folder, held, run.record, defaults)
        run.summary = read_json(run.path("summary.json"))
        if run.summary:
            return run
    machine.barrier()  # before the first process takes the folder, all have seen what is in it
    if machine.main:
        take_folder(run)
    machine.barrier()

    # What trains: everything that is not frozen. A reference has no gates that learn.
    if config["mode"] in ("cheap", "adapter"):
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and ".gate." not in name)
    run.trained = [p for p in model.parameters() if p.requires_grad]
    run.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    run.frozen_hash = weights_hash(run.frozen)
    run.optimizers = make_optimizers(model, config, machine.dtype)
    optimized = [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in run.trained}
    run.losses = active_losses(config)
    if os.path.exists(run.path("ckpt.pt")):
        resume(run)
    if machine.main:
        run.log = open(run.path("log.jsonl"), "a" if run.step else "w", encoding="utf-8")
    note_machine(run)
    absent = [name[7:] for name in config if name.startswith("lambda_") and config[name] and name[7:] not in run.losses]
    machine.print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, "
                  f"{sum(p.numel() for p in run.trained):,} trained; {machine.describe()}")
    machine.print(f"losses: {', '.join(run.losses)}" + f"; here without: {', '.join(absent)}" * bool(absent))
    return run


def take_folder(run):
    """Lock the folder until the process ends, and write config.json. With --overwrite what was there goes."""
    os.makedirs(run.folder, exist_ok=True)
    run.lock = FileLock(run.path("lock"))
    try:
        run.lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another process is training in {run.folder}; wait for it, or choose another --seed or "
                          "--out_dir") from None
    if run.config["overwrite"]:
        for name in os.listdir(run.folder):
            if name in ("summary.json", "config.json", "log.jsonl") or name.startswith("ckpt"):
                os.remove(run.path(name))
    if not os.path.exists(run.path("config.json")):
        tokenizer = os.path.join("data", run.config["dataset"], "tokenizer.json")
        if os.path.exists(tokenizer):  # it travels with the run
            write_whole(run.path("tokenizer.json"), lambda part: shutil.copyfile(tokenizer, part))
        write_json(run.path("config.json"), run.record)


def save(run):
    """Write ckpt.pt: the controllers (of a backbone everything), the optimizers until the run is finished, and
    where it stands. The frozen weights are proved unmoved first."""
    if weights_hash(run.frozen) != run.frozen_hash:
        raise ConfigError(f"a frozen weight moved in {run.folder}: this is no controller-only run; see what a gate, "
                          "label or loss of yours writes to")
    if run.machine.main:
        finished = run.step == run.config["max_iters"]
        weights = {name: tensor for name, tensor in run.model.state_dict().items()
                   if name not in run.frozen or name in run.model.controllers()}
        checkpoint = {"record": run.record, "step": run.step, "seconds": run.seconds,
                      "evaluations": run.evaluations, "machines": run.machines, "layer_order": run.layer_order,
                      "log_bytes": os.path.getsize(run.path("log.jsonl")), "model": weights,
                      "optimizers": [] if finished else [o.state_dict() for o in run.optimizers]}
        names = [f"ckpt-{run.step}.pt"] if run.config["keep_checkpoints"] else []
        for name in [*names, "ckpt.pt"]:
            write_whole(run.path(name), lambda part: torch.save(checkpoint, part))
    run.machine.barrier()


def resume(run):
    """Stand where the checkpoint stood. What was logged after it happens again, to the same numbers."""
    checkpoint = read_checkpoint(run.folder)
    say_if_other_code(checkpoint["record"], f"what {run.folder} has done so far", run.machine)
    take_up(run.model, checkpoint, run.folder, run.record["backbone"])
    for optimizer, state in zip(run.optimizers, checkpoint["optimizers"]):
        optimizer.load_state_dict(state)
    run.step, run.seconds = checkpoint["step"], checkpoint["seconds"]
    run.evaluations, run.machines = checkpoint["evaluations"], checkpoint["machines"]
    run.layer_order = checkpoint["layer_order"]
    run.model.set_budget(run.config["budget"], run.layer_order)
    if run.machine.main:
        with open(run.path("log.jsonl"), "a", encoding="utf-8") as f:
            f.truncate(checkpoint["log_bytes"])
    run.machine.print(f"resuming {run.folder} at step {run.step}")


def take_up(model, checkpoint, folder, backbone):
    """Put a checkpoint into a model whose backbone is loaded; it must be the one that it was trained on."""
    held = checkpoint["record"]["backbone"]
    if backbone and held["weights"] != backbone["weights"]:
        raise ConfigError(f"{folder} was trained on another backbone than the one now in {backbone['path']}; put "
                          "that one back")
    load_weights(model, checkpoint["model"], folder, model.controllers() if backbone else model.backbone())


def note_machine(run):
    here = run.machine.describe()
    if run.machines and run.machines[-1] != here:
        run.machine.print(f"this run was on {run.machines[-1]} before, and is on {here} now: the last bits of its "
                          "numbers may differ from a run on one machine")
    if here not in run.machines[-1:]:
        run.machines = [*run.machines, here]


def load_run(folder, overrides=None, name="ckpt.pt", plugins=()):
    """A run's checkpoint -> (model, checkpoint, machine), to look at: nothing in it is trained further. The run
    and its backbone are needed, and no data. overrides: keys of the machine. plugins: in place of its own."""
    checkpoint = read_checkpoint(folder, name)
    record = checkpoint["record"]
    paths = [load_plugin(path) for path in plugins or record["config"]["plugin"]]
    if sorted(PLUGINS[path] for path in paths) != sorted(record["plugins"].values()):
        raise ConfigError(f"the plugin has changed since {folder} was trained; its text stands in config.json")
    machine = Machine({**record["config"], "device": "auto", "dtype": "auto", "threads": 0, **(overrides or {})})
    say_if_other_code(record, folder, machine)
    model = build(record["config"], record["tokenizer"]["vocab_size"], machine)
    backbone = None
    if record["backbone"]:
        backbone = load_backbone(model, find_backbone_of(folder, record["backbone"]["path"]), machine)
    take_up(model, checkpoint, folder, backbone)
    model.set_budget(record["config"]["budget"], checkpoint["layer_order"])
    cast_frozen(model.requires_grad_(False), machine)
    return model, checkpoint, machine


def data_of_run(folder, record):
    """{split: token ids} of the text that a run was trained on; another text in its place is refused."""
    name = record["config"]["dataset"]
    data, meta = load_data(name, record["config"]["block_size"])
    if {split: facts["sha256"] for split, facts in meta["splits"].items()} != record["data"]:
        raise ConfigError(f"data/{name} is not the text that {folder} was trained on; put that one back, or give this "
                          "one another name and --dataset=NAME")
    return data


def refuse_other_tokenizer(meta, tokenizer, name):
    """Is the text data/<name>, by its meta, in the tokens of this tokenizer?"""
    if any(meta[key] != tokenizer[key] for key in ("vocab_size", "eot_token")):
        raise ConfigError(f"data/{name} is in the tokens of {meta['tokenizer']}, and the run in those of "
                          f"{tokenizer['tokenizer']}; make it with that --tokenizer")


def recalibrate(model, folder, checkpoint, machine, budget):
    """Set a loaded run's thresholds for another budget, on its own training text."""
    config = checkpoint["record"]["config"]
    data = data_of_run(folder, checkpoint["record"])
    model.set_budget(budget, checkpoint["layer_order"])
    calibrate(model, eval_batch(data["train"], config, config["final_eval_iters"]), machine)


def find_backbone_of(folder, path):
    """Where a run's backbone is now: where it was, or, in a copied out/, at the same place beside the run."""
    if path.startswith("hf:") or os.path.exists(path):
        return path
    scale, recipe, seed = path.split(os.sep)[-3:]
    beside = os.path.join(os.path.dirname(os.path.abspath(folder)), "..", recipe, seed)
    if os.path.exists(beside):
        return os.path.normpath(beside)
    raise ConfigError(f"the backbone of {folder} was {path}, which is not there any more; put it back, or copy it to "
                      f"{os.path.normpath(beside)}")
