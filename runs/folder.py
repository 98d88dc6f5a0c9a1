"""A run's folder: whose it is, who may write there, and what a run left in it.

A folder is a run's from its first checkpoint on: until then there is nothing to lose, and another config may
take it. What a command asks for is compared, key by key, with the config in config.json and with the one
inside ckpt.pt, so neither can be taken for another run's.
"""
import glob
import os

from filelock import FileLock, Timeout

from configurator import ConfigError
from runs.files import check_fields, digest_of, read_checkpoint, read_json

# What a backbone depends on. With its data's sha256 it is the backbone's identity.
BACKBONE_KEYS = ("seed", "n_layer", "n_head", "n_embd", "block_size", "activation", "max_iters",
                 "warmup_iters", "batch_size", "learning_rate", "muon_lr", "gradient_accumulation_steps",
                 "min_lr_ratio", "weight_decay", "beta1", "beta2", "grad_clip")
# Keys that may differ between a run and its resumption, because they change no number; `threads` may change
# the last bits, and the run then says so.
FREE_KEYS = {"overwrite", "eval_only", "log_interval", "keep_checkpoints", "threads", "out_dir", "plugin"}
# config.json holds these beside the config.
NOT_CONFIG = {"versions", "git_commit"}

CONFIG_FIELDS = {"recipe": str, "scale": str, "mode": str, "seed": int, "max_iters": int, "batch_size": int,
                 "identity": str, "data": dict, "cheap_rank": int, "controlled": list, "dataset": str,
                 "block_size": int, "device": str, "dtype": str, "plugin": list, "plugin_sha256": list}
SUMMARY_FIELDS = {"val_loss": dict, "test_loss": dict, "realised_budget": dict, "evaluations": list,
                  "steps": int, "seconds": float, "flops": dict, "identity": str}


# -----------------------------------------------------------------------------
# one config against another

def what_counts(config):
    """The keys and values that make two runs the same run. Of a backbone only what it depends on counts."""
    counted = config.keys() - FREE_KEYS - NOT_CONFIG
    if config.get("mode") == "full":
        counted = {"mode", "identity", "device", "dtype", *BACKBONE_KEYS} & config.keys()
    first = {"mode": 0, "recipe": 1, "seed": 2}  # what a reader wants to be told first
    return {key: config[key] for key in sorted(counted, key=lambda key: (first.get(key, 3), key))}


def differences(held, asked):
    """What is held in place of what is asked for, as words, one for each key that counts."""
    return [f"{key} (there {held.get(key)!r}, here {value!r})" for key, value in what_counts(asked).items()
            if held.get(key) != value]


def refuse_another_config(where, held, asked):
    """Compare the config that is held (a dict or None) with the one that is asked for."""
    changed = differences(held, asked) if held is not None else []
    if not changed:
        return
    remedy = "give this one another --recipe, --seed or --out_dir"
    if replaceable(held, asked):
        remedy += ", or replace that one with --overwrite"
    raise ConfigError(f"{where} belongs to a run with another config: {', '.join(changed[:4])}; {remedy}")


def replaceable(held, asked):
    """--overwrite replaces a run of the same recipe: never a backbone by a gate, or one arm by another."""
    return all(held.get(key) == asked[key] for key in ("mode", "recipe") if key in asked)


# -----------------------------------------------------------------------------
# what a run left

def read_config(folder):
    """config.json, or None where there is none."""
    return read_json(os.path.join(folder, "config.json"), CONFIG_FIELDS)


def read_summary(folder):
    """The summary of a finished run, without its digest; None where there is none."""
    path = os.path.join(folder, "summary.json")
    summary = read_json(path, SUMMARY_FIELDS)
    if summary is None:
        return None
    digest = summary.pop("digest", None)  # older summaries have none
    if digest is not None and digest != summary_digest(summary, read_config(folder) or {}):
        raise ConfigError(f"{path} is not as it was written, or of another run than config.json beside it; "
                          "put the original back, or start that run again with --overwrite")
    return summary


def summary_digest(summary, config):
    return digest_of([summary, sorted(what_counts(config).items())])


def read_run(folder, name="ckpt.pt"):
    """A checkpoint of the run in this folder. One that lies beside the config of another run is refused."""
    checkpoint = read_checkpoint(folder, name)
    path, config = os.path.join(folder, name), checkpoint["config"]
    check_fields(f"{path}, config", config, CONFIG_FIELDS)
    beside = read_config(folder)
    if beside is not None:
        changed = differences(beside, config) or differences(config, beside)
        if changed:
            raise ConfigError(f"{path} is of another run than config.json beside it: "
                              f"{', '.join(changed[:4])}; put its own back, or start that run again with "
                              "--overwrite")
    return checkpoint


def is_taken(folder):
    """Has a run got somewhere in this folder?"""
    return any(os.path.lexists(os.path.join(folder, name)) for name in ("ckpt.pt", "summary.json"))


def refuse_if_taken(folder, asked):
    """Refuse a folder that holds another run."""
    if is_taken(folder):
        refuse_another_config(folder, read_config(folder), asked)


# -----------------------------------------------------------------------------
# taking a folder

def claim(folder, record, overwrite):
    """Take the folder for this run -> its lock, held until the process ends. A run with another config, or
    another process in the same place, is refused; `overwrite` deletes what a run of the same recipe wrote
    there."""
    try:
        os.makedirs(folder, exist_ok=True)
        lock = FileLock(os.path.join(folder, "lock"))
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another process is training in {folder}; wait for it, or choose another --seed "
                          "or --out_dir") from None
    except OSError as error:
        raise ConfigError(f"cannot make {folder} ({error.strerror}); choose another with --out_dir") from None
    if overwrite:
        clear(folder, record)
    refuse_if_taken(folder, record)
    return lock


def clear(folder, record):
    """Delete the run in this folder, where --overwrite may replace it."""
    held = whose(folder)
    if held is not None and not replaceable(held, record):
        other = f"mode {held.get('mode')!r} and recipe {held.get('recipe')!r}"
        raise ConfigError(f"{folder} holds a run with {other}, not {record['mode']!r} and "
                          f"{record['recipe']!r}: --overwrite does not replace it; choose another --out_dir, "
                          "or delete that folder yourself")
    names = ("summary.json", "ckpt.pt", "ckpt-*.pt", "log.jsonl", "config.json")
    paths = [path for name in names for path in glob.glob(os.path.join(glob.escape(folder), name))]
    for path in paths:
        if os.path.isdir(path):
            raise ConfigError(f"{path} is a folder, which no run makes; move it away")
    for path in paths:
        os.remove(path)


def whose(folder):
    """The config of the run in this folder, from whichever of its files can be read; None where none can."""
    for read in (read_config, read_checkpoint):
        try:
            held = read(folder)
        except ConfigError:
            continue
        if held is not None:
            return held.get("config", held)
    return None
