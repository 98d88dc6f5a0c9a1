"""The machine that a run is on: device, dtype, threads, and this process's place among several."""
import ctypes
import math
import os
import platform
import sys
from contextlib import suppress

import torch

from configurator import ConfigError, did_you_mean


class Machine:
    """The device, the compute dtype, and this process's place among several. `resolved(config)` gives the
    config with what `auto` became."""

    def __init__(self, config):
        self.process, self.processes = place_among_processes()
        self.main = self.process == 0
        self.device = choose_device(config["device"])
        if config["batch_size"] % self.processes:
            raise ConfigError(f"--batch_size={config['batch_size']} does not divide among {self.processes} "
                              "processes; give a multiple")
        if self.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            torch.set_float32_matmul_precision("high")
        elif sys.platform == "linux":
            keep_freed_memory()
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        self.threads = torch.get_num_threads()
        dtype = config["dtype"]
        if dtype == "auto":
            dtype = "bfloat16" if fast_bfloat16(self.device) else "float32"
        self.dtype = getattr(torch, dtype)
        if self.processes > 1 and not torch.distributed.is_initialized():
            join_the_others("nccl" if self.device == "cuda" else "gloo")

    def resolved(self, config):
        return {**config, "device": self.device, "dtype": str(self.dtype)[6:], "threads": self.threads}

    def autocast(self):
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def sum(self, tensors):
        """Add each tensor up over all processes, in place."""
        if self.processes == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(total.view_as(tensor))

    def barrier(self):
        if self.processes > 1:
            torch.distributed.barrier()

    def close(self):
        if self.processes > 1:
            torch.distributed.destroy_process_group()

    def print(self, text):
        """Once, not once a process."""
        if self.main:
            print(text, flush=True)

    def memory(self):
        """All the bytes that there are for a run."""
        if self.device == "cuda":
            return torch.cuda.mem_get_info()[1]
        with suppress(OSError, ValueError, AttributeError):
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return math.inf

    def describe(self):
        name = platform.processor() or platform.machine()
        if self.device == "cuda":
            name = torch.cuda.get_device_name()
        return f"{name}, {self.threads} threads, {str(self.dtype)[6:]}, torch {torch.__version__}"


def place_among_processes():
    """(this process's number, how many there are), as torchrun says."""
    names = ("RANK", "WORLD_SIZE")
    if sum(name in os.environ for name in names) == 1:
        raise ConfigError("of RANK and WORLD_SIZE only one is set; start several processes with torchrun, or "
                          "unset it")
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        process, processes = map(int, given)
    except ValueError:
        process, processes = -1, -1
    if not 0 <= process < processes:
        raise ConfigError(f"RANK={given[0]} and WORLD_SIZE={given[1]} name no process of several; start them "
                          "with torchrun, or unset both")
    return process, processes


def join_the_others(backend):
    try:
        torch.distributed.init_process_group(backend)
    except (ValueError, RuntimeError) as error:  # of its environment, of the network
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(f"the {os.environ['WORLD_SIZE']} processes do not find each other ({detail}); "
                          "start them with torchrun, or unset RANK and WORLD_SIZE") from None


def choose_device(asked):
    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device={asked!r} is unknown; {did_you_mean(asked, ('auto', 'cpu', 'cuda'))}")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device='cuda' but PyTorch finds no CUDA device; use --device=cpu or leave "
                          "it to auto")
    return "cuda" if torch.cuda.is_available() and asked != "cpu" else "cpu"


def keep_freed_memory():
    """glibc returns every large tensor to the system, which then clears its pages again: a fifth of a
    step."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def fast_bfloat16(device):
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # new in 2.12
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def compile_layers(model):
    """Compile what has one shape; routing stays eager, and so do the gradients of its scores."""
    # FFN.forward has a dozen variants: two widths, several numbers of rows, with and without a gradient. What
    # comes after the limit, 8 by default, would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for block in model.h:
        block.attn.compile()
        block.mlp.compile()
        if block.controlled:
            block.cheap.compile()
