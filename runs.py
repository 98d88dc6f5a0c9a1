"""Where a run happens and what it leaves: the machine, and files that appear whole or not at all."""
import ctypes
import glob
import hashlib
import json
import os
import platform
import subprocess
import sys
import warnings

import torch
from filelock import FileLock, Timeout

from configurator import ConfigError
from model import GPT, GPTConfig, load_gpt2
from prepare import load_data

# -----------------------------------------------------------------------------
# the machine

class Machine:
    """The device, the compute dtype, and this process's place among several."""

    def __init__(self, config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config["device"] not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device={config['device']!r} is unknown; use auto, cpu or cuda")
        cuda = torch.cuda.is_available()
        if config["device"] == "cuda" and not cuda:
            raise ConfigError("--device='cuda' but PyTorch finds no CUDA device; use --device=cpu or leave it to auto")
        self.device = "cuda" if cuda and config["device"] != "cpu" else "cpu"
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")
        if self.device == "cpu" and sys.platform == "linux":
            # glibc returns every large tensor to the system, which then clears its pages again: a fifth of a training step.
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0), libc.mallopt(-1, -1)  # M_MMAP_MAX, M_TRIM_THRESHOLD
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        config["threads"] = torch.get_num_threads()
        if config["dtype"] == "auto":
            config["dtype"] = "bfloat16" if self.fast_bfloat16() else "float32"
        config["device"] = self.device
        self.dtype = getattr(torch, config["dtype"])
        if self.world > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device == "cuda" else "gloo")
        if config["batch_size"] % self.world:
            raise ConfigError(f"--batch_size={config['batch_size']} does not divide among {self.world} processes; give a multiple")

    def fast_bfloat16(self):
        if self.device == "cuda":
            return torch.cuda.get_device_capability() >= (8, 0)
        found = getattr(torch.cpu, "get_capabilities", dict)()  # new in 2.12
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))

    def autocast(self):
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def sum(self, tensors):
        """Add each tensor up over all processes, in place."""
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            torch.distributed.all_reduce(flat)
            for t, s in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(s.view_as(t))

    def barrier(self):
        if self.world > 1:
            torch.distributed.barrier()

    def close(self):
        if self.world > 1:
            torch.distributed.destroy_process_group()

    def describe(self):
        name = torch.cuda.get_device_name() if self.device == "cuda" else platform.processor() or platform.machine()
        return f"{name}, {torch.get_num_threads()} threads, {str(self.dtype)[6:]}, torch {torch.__version__}"


# -----------------------------------------------------------------------------
# what a run leaves on disk

def write_whole(path, write):
    """Call write(temporary path), then put the file under its name: it is there whole or not at all."""
    part = f"{path}.part"
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        if os.path.exists(part):
            os.remove(part)
        raise ConfigError(f"cannot write {path} ({error}); what was there before is intact: free space and run the same command") from None


def write_json(path, value):
    def write(part):
        with open(part, "w") as f:
            json.dump(value, f, indent=1)
    write_whole(path, write)


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); delete it, or the whole run with --overwrite") from None


CHECKPOINT_KEYS = {"config", "identity", "backbone", "step", "seconds", "evals", "log_bytes", "model", "budgets", "optimizers"}


def read_checkpoint(folder, name="ckpt.pt"):
    """The checkpoint of a run, read with weights_only=True: a pickle with code in it is refused, never executed."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        raise ConfigError(f"{path} does not exist; train it first, or name another run")
    try:
        with warnings.catch_warnings(action="ignore"):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
        return ckpt if isinstance(ckpt, dict) and CHECKPOINT_KEYS <= set(ckpt) else 1 / 0
    except Exception as error:
        raise ConfigError(f"{path} is not a checkpoint of this program ({type(error).__name__}); it may be truncated: delete it") from None


def load_weights(model, weights, path, needed):
    """Copy named tensors into the model, whole or not at all; every name in `needed` must be there."""
    own = model.state_dict()
    wrong = [f"{k} {tuple(v.shape)}" for k, v in weights.items() if k not in own or own[k].shape != v.shape]
    wrong += [f"{k} is missing" for k in needed if k not in weights]
    if wrong:
        raise ConfigError(f"{path} is of another shape ({wrong[0]} does not fit); use the config that it was trained with")
    model.load_state_dict(weights, strict=False)


def weights_hash(params):
    """sha256 over named tensors."""
    digest = hashlib.sha256()
    for name, p in sorted(params.items()):
        digest.update(name.encode() + p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def git_commit():
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "not a git checkout"


# Keys that may differ between a run and its resumption: they change no number.
FREE_KEYS = {"overwrite", "eval_only", "log_interval", "keep_checkpoints"}


def open_run(out, config, overwrite):
    """Claim the folder `out` for this config -> its lock, held until the process ends. A run with another config,
    or another process in the same place, is refused; `overwrite` deletes what this program wrote there."""
    try:
        os.makedirs(out, exist_ok=True)
        lock = FileLock(os.path.join(out, "lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another process is training in {out}; wait for it, or choose another --seed or --out_dir") from None
    except OSError as error:
        raise ConfigError(f"cannot make {out} ({error.strerror}); choose another with --out_dir") from None
    if overwrite:
        for name in ("summary.json", "ckpt.pt", "ckpt-*.pt", "log.jsonl", "config.json"):
            for path in glob.glob(os.path.join(glob.escape(out), name)):
                os.remove(path)
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        write_json(path, {**config, "versions": {"torch": torch.__version__, "python": sys.version.split()[0]}, "git_commit": git_commit()})
    refuse_another_config(out, config)
    return lock


def refuse_another_config(out, config):
    there = read_json(os.path.join(out, "config.json"))
    differ = [f"{k} (there {there.get(k)!r}, here {v!r})" for k, v in config.items() if there and k not in FREE_KEYS and there.get(k) != v]
    if differ:
        raise ConfigError(f"{out} holds a run with another config: {', '.join(differ[:4])}; choose another --recipe, --seed "
                          "or --out_dir, or replace that run with --overwrite")


# -----------------------------------------------------------------------------
# models on disk

# What a backbone depends on; with its data's sha256 it is the backbone's identity.
BACKBONE_KEYS = ("seed", "n_layer", "n_head", "n_embd", "block_size", "activation", "max_iters", "warmup_iters", "batch_size", "learning_rate", "muon_lr",
                 "gradient_accumulation_steps", "min_lr_ratio", "weight_decay", "beta1", "beta2", "grad_clip")


def identity(config, meta):
    """What a backbone is: a hash of the keys that it depends on and of its data."""
    facts = {k: config[k] for k in BACKBONE_KEYS} | {s: meta["splits"][s]["sha256"] for s in ("train", "val")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def run_folder(config):
    return config["out_dir"] or os.path.join("out", config["scale"], config["recipe"], f"seed{config['seed']}")


def model_config(config, vocab_size):
    fields = {k: config[k] for k in GPTConfig.__dataclass_fields__ if k in config}
    fields["controlled"] = () if config["mode"] == "dense" else tuple(config["controlled"])
    return GPTConfig(**fields, vocab_size=vocab_size)


def build(config, meta, machine):
    """A model for this config, freshly initialised as a function of the seed."""
    torch.manual_seed(config["seed"])
    return GPT(model_config(config, meta["vocab_size"])).to(machine.device)


def freeze(model, machine):
    """No gradient for the backbone, and its weights in the compute dtype."""
    for p in model.backbone().values():
        p.requires_grad_(False)
    cast_frozen(model, machine)


def cast_frozen(model, machine):
    """The matrices that nothing trains in the compute dtype: autocast would cast them at every use."""
    for name, p in model.named_parameters():
        if machine.dtype == torch.bfloat16 and not p.requires_grad and (".c_" in name or name.startswith("wte")):
            p.data = p.data.to(torch.bfloat16)


def load_backbone(model, folder, machine):
    """Copy the backbone into the model and freeze it -> what the summary says of it."""
    if folder.startswith("hf:"):
        try:
            load_gpt2(model, folder[3:])
        except ValueError as error:
            raise ConfigError(str(error)) from None
        known = {"path": folder, "identity": folder}
    else:
        ckpt = read_checkpoint(folder)
        load_weights(model, ckpt["model"], folder, needed=model.backbone())
        known = {"path": folder, "identity": ckpt["identity"]}
    known["weights"] = weights_hash(model.backbone())
    freeze(model, machine)
    return known


def load_controllers(model, ckpt, folder, known):
    """Put a checkpoint into a model whose backbone is loaded; it must be the backbone that the run was trained on."""
    if known and (ckpt["backbone"] or {}).get("weights") != known["weights"]:
        raise ConfigError(f"{folder} was trained on another backbone than the one now in {known['path']}; put that one back")
    load_weights(model, ckpt["model"], folder, needed={n: p for n, p in model.named_parameters() if not known or n in model.controllers()})
    for i, budget in zip(model.config.controlled, ckpt["budgets"]):
        model.h[i].budget = budget


def load_run(folder, overrides=None, name="ckpt.pt"):
    """A run's checkpoint -> (model, config, data, meta, machine), for sample.py, study.py and --eval_only."""
    ckpt = read_checkpoint(folder, name)
    config = {**ckpt["config"], "device": "auto", "dtype": "auto", **(overrides or {})}
    machine = Machine(config)
    data, meta = load_data(config["dataset"], config["block_size"])
    model = build(config, meta, machine)
    known = load_backbone(model, ckpt["backbone"]["path"], machine) if ckpt["backbone"] else None
    load_controllers(model, ckpt, folder, known)
    cast_frozen(model.requires_grad_(False), machine)
    return model, config, data, meta, machine


def paint(pieces, depths, most, color):
    """Text in which each token shows its depth, how many of the `most` controlled layers ran full: as a background
    from black (none) to red (all) in colour, or else as a digit under each character."""
    if color:
        ramp = [16, 52, 88, 124, 160, 196]
        return "".join(f"\x1b[48;5;{ramp[round(d * 5 / max(1, most))]};38;5;231m{p}" for p, d in zip(pieces, depths)) + "\x1b[0m"
    text = "".join(p.replace("\n", " ") for p in pieces)
    digits = "".join("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[min(d, 35)] * len(p) for p, d in zip(pieces, depths))
    return "\n".join(f"{text[i:i + 100]}\n{digits[i:i + 100]}" for i in range(0, len(text), 100))
