"""The machine that a run is on: device, dtype, threads, and this process's place among several."""
import contextlib
import ctypes
import math
import os
import platform
import signal
import sys

import torch

from configurator import ConfigError


class Machine:
    """The device, the compute dtype, the threads, and this process's place among several (torchrun)."""

    def __init__(self, config):
        self.process, self.processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
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
        torch.set_num_threads(config["threads"] or min(torch.get_num_threads(), cores()))
        self.threads = torch.get_num_threads()
        dtype = config["dtype"]
        if dtype == "auto":
            dtype = "bfloat16" if fast_bfloat16(self.device) else "float32"
        self.dtype = getattr(torch, dtype)
        if self.processes > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device == "cuda" else "gloo")
        self.say_if_busy()

    def resolved(self, config):
        """The config with what `auto` became."""
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

    def describe(self):
        name = platform.processor() or platform.machine()
        if self.device == "cuda":
            name = torch.cuda.get_device_name()
        return f"{name}, {self.threads} threads, {str(self.dtype)[6:]}, torch {torch.__version__}"

    def say_if_busy(self):
        """Beside another busy process two threads wait for each other at every product."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        if self.device == "cpu" and self.threads > 1 and load > cores() - self.threads + 0.7:
            self.print(f"this machine is busy (load {load:.1f}); --threads=1 is faster")


def choose_device(asked):
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device='cuda' but PyTorch finds no CUDA device; use --device=cpu or leave it to auto")
    return "cuda" if torch.cuda.is_available() and asked != "cpu" else "cpu"


def cores():
    """How many cores this process may use: fewer than the host has, where a container has a quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max", encoding="utf-8") as f:
            quota, period = f.read().split()
        count = min(count, math.ceil(int(quota) / int(period)))  # ValueError: "max", no quota
    return max(1, count)


def keep_freed_memory():
    """glibc returns every large tensor to the system, which then clears its pages again: a fifth of a step."""
    with contextlib.suppress(OSError, AttributeError):
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
    # FFN.forward has a dozen variants: two widths, several numbers of tokens, with and without a gradient. What
    # comes after the limit, 8 by default, would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    for block in model.h:
        block.attn.compile()
        block.mlp.compile()
        if block.controlled:
            block.cheap.compile()


def catch_signals():
    """SIGTERM (Slurm, spot machines) and Ctrl-C no longer end the process but fill the list that is returned,
    so that a run can finish its step and save. A second Ctrl-C ends it."""
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    return caught
