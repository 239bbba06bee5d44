"""Where and how large to run: device and profile.

``TOKCX_DEVICE`` (default: cpu) and ``TOKCX_PROFILE`` (``quick`` or ``full``, default: quick) set what a chapter uses;
every function also takes a device of its own.
"""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from tokcx_lib.validation import as_count, shown

PROFILES = ("quick", "full")


def device(name: str | torch.device | None = None) -> torch.device:
    """The device to run on: `name`, else ``TOKCX_DEVICE``, else the CPU.

    Raises
    ------
    ValueError
        If the name is no device of PyTorch, the machine does not have it, or it does not compute in float64.
    """
    if name is not None and not isinstance(name, (str, torch.device)):
        raise ValueError(f"device: expected the name of a device, such as 'cpu', got {shown(name)}")
    wanted = str(name or os.environ.get("TOKCX_DEVICE") or "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kinds of devices that PyTorch has given up
            chosen = torch.device(wanted)
            torch.ones(1, dtype=torch.float64, device=chosen).add(1).item()  # "meta" has tensors, but no numbers
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(f"device: {wanted!r} is not available; this machine has {', '.join(there)}") from error
    return chosen


def profile() -> str:
    """``quick`` (a chapter in about a minute on 2 CPU cores) or ``full`` (paper scale), from ``TOKCX_PROFILE``."""
    chosen = os.environ.get("TOKCX_PROFILE") or "quick"
    if chosen not in PROFILES:
        raise ValueError(f"TOKCX_PROFILE: expected one of {', '.join(PROFILES)}, got {chosen!r}")
    return chosen


def generator(seed: int | torch.Generator | None) -> torch.Generator:
    """A random stream: the one given, a new one from an integer seed, or a new one from the system's entropy.

    Streams from a seed live on the CPU, so the same seed draws the same tokens on every device.

    Raises
    ------
    ValueError
        If it is none of these, or the seed takes more than 64 bits.
    """
    if isinstance(seed, torch.Generator):
        return seed
    stream = torch.Generator()
    if seed is None:
        stream.seed()
        return stream
    try:
        return stream.manual_seed(as_count("seed", seed, least=-(2**63), most=2**64 - 1))
    except ValueError as error:
        wanted = "a torch.Generator, an integer seed of up to 64 bits, or None"
        raise ValueError(f"seed, generator: expected {wanted}, got {shown(seed)}") from error


def stream(*keys: int) -> torch.Generator:
    """A random stream named by integers, such as (seed, layer, head, replicate): any of them can be re-drawn alone.

    The seed is numpy's SeedSequence of the keys, so streams of different keys are independent for all purposes.

    Raises
    ------
    ValueError
        If a key is not an integer >= 0.
    """
    numbers = [as_count("seed, keys", key, least=0, most=2**128) for key in keys]
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return generator(int(state[0]) >> 1)


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached: one request, without the retries that a download makes."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # the client raises many kinds, from its own and from the network's libraries
        return False
    return True


def peak_memory(used: torch.device) -> int:
    """The most bytes that this process has had in memory, and on the device that it used."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most + (torch.cuda.max_memory_allocated(used) if used.type == "cuda" else 0)


def report() -> str:
    """The line that opens every chapter: ``device: cpu, profile: quick``."""
    chosen = device()
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type
    return f"device: {name}, profile: {profile()}"


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for many small operations: starting more for each costs more than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
