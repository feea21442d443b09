"""Processes of the tests that form a group, and the one limit on how long anything may take."""

import multiprocessing
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist


# Seconds, many times what is needed on the busiest machine: it only ends what would never end by itself
HANG_LIMIT = 30 * 60


def start(function, world_size, folder, *arguments, backend="gloo"):
    """Start processes that form a group and run `function(rank, world_size, *arguments)`."""
    store = str(folder / f"store{len(list(folder.glob('store*')))}")  # a used one would not do
    arguments = function, world_size, store, backend, arguments
    # Forked from a process that has imported what takes long, once for all tests. Not where CUDA may be at work in it
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.set_forkserver_preload(["longnet_hf", "transformers.trainer", "torch.distributed.fsdp"])
    return torch.multiprocessing.start_processes(in_group, arguments, world_size, join=False, start_method=method)


def spawn(function, world_size, folder, *arguments, backend="gloo"):
    """Run `function(rank, world_size, *arguments)` in processes that form a group, and wait for them."""
    context = start(function, world_size, folder, *arguments, backend=backend)
    deadline = time.monotonic() + HANG_LIMIT
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError("the processes wait for one another")


def in_group(rank, function, world_size, store, backend, arguments):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    limit = timedelta(seconds=HANG_LIMIT)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit)
    function(rank, world_size, *arguments)
    dist.barrier()  # a process that leaves early aborts the others' connections
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is checked; the threads of gloo now and then abort an orderly end of the interpreter


def set_environment(rank, world_size, **variables):
    """As a launcher does; the group that is there already is used."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **variables)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    os.environ["ACCELERATE_USE_CPU"] = str(dist.get_backend() == "gloo")
