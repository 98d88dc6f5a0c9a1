"""Files that appear whole or not at all, and are read with a schema. Errors name the file and the field."""
import hashlib
import json
import os
import warnings
from contextlib import suppress

import torch

from configurator import ConfigError


# -----------------------------------------------------------------------------
# writing

def write_whole(path, write):
    """Call write(temporary path), then put that file under its name: it is there whole or not at all, also
    after a crash of the machine."""
    temporary = f"{path}.part"
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(os.path.dirname(path) or ".")
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        with suppress(OSError):
            os.remove(temporary)
        raise ConfigError(f"cannot write {path} ({error}); what was there before is intact") from None


def sync(path):
    """Have the system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path, text):
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
    write_whole(path, write)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


# -----------------------------------------------------------------------------
# reading

LOOK = "look at what it is and who may read it"
RUN_AGAIN = "start that run again with --overwrite"


def read_json(path, fields=None, remedy=RUN_AGAIN):
    """A JSON object, or None where there is no file. fields {name: type}: what it must hold. Raises
    ConfigError that names the file and the field, and the remedy."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {LOOK}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON ({error}); {remedy}") from None
    check_fields(path, value, fields or {}, remedy)
    return value


def check_fields(path, value, fields, remedy=RUN_AGAIN):
    """Refuse what is no dict, or lacks a field of the right type."""
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {shortened(value)} in place of named fields; {remedy}")
    for name, kind in fields.items():
        given = value.get(name)
        if type(given) is not kind and not (kind is float and type(given) is int):
            raise ConfigError(f"{path}: {name} is {shortened(given)}, not {kind.__name__}; {remedy}")


def shortened(value):
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"{text[:57]}..."


CHECKPOINT_FIELDS = {"config": dict, "identity": str, "step": int, "seconds": float, "evaluations": list,
                     "machines": list, "log_bytes": int, "model": dict, "budgets": list, "optimizers": list}


def read_checkpoint(folder, name="ckpt.pt"):
    """The checkpoint of a run, read with weights_only=True: a pickle with code in it is refused, never
    executed."""
    path = os.path.join(folder, name)
    if not os.path.lexists(path):
        raise ConfigError(f"{path} does not exist; train it first, or name a run's folder, such as "
                          "out/tiny/best/seed0")
    try:
        with warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, IsADirectoryError) as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {LOOK}") from None
    except Exception as error:  # of zip files, of pickles, of tensors
        raise ConfigError(f"{path} is not a checkpoint of this program ({type(error).__name__}); if it is "
                          "truncated, start the run again with --overwrite") from None
    check_fields(path, checkpoint, CHECKPOINT_FIELDS)
    digest = checkpoint.pop("digest", None)  # older checkpoints have none
    if digest is not None and digest != digest_of(checkpoint):
        raise ConfigError(f"{path} is not as it was written: its contents do not agree with its digest; put "
                          "the original back, or start the run again with --overwrite")
    return checkpoint


# -----------------------------------------------------------------------------
# hashes

def weights_hash(params):
    """sha256 over named tensors."""
    digest = hashlib.sha256()
    for name, p in sorted(params.items()):
        digest.update(name.encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest_of(value):
    """sha256 over whatever a checkpoint or a JSON file holds."""
    digest = hashlib.sha256()
    add_to_digest(digest, value)
    return digest.hexdigest()


def add_to_digest(digest, value):
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)}".encode())
        items = value
        if isinstance(value, dict):
            items = (each for pair in value.items() for each in pair)
        for item in items:
            add_to_digest(digest, item)
    else:
        digest.update(repr(value).encode("utf-8", "surrogateescape"))
