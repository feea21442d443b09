"""Processes of the tests that form a group."""

import os
import time

import torch
import torch.distributed as dist


# Seconds after which processes that wait for one another are given up: far more than any machine needs, however busy
HANG = 3600


def spawn(function, world_size, folder, *arguments, backend="gloo"):
    """Run `function(rank, world_size, *arguments)` in processes that form a group."""
    store = str(folder / f"store{len(list(folder.glob('store*')))}")  # a used one would not do
    arguments = function, world_size, store, backend, arguments
    processes = torch.multiprocessing.spawn(in_group, args=arguments, nprocs=world_size, join=False)
    deadline = time.monotonic() + HANG
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            raise TimeoutError("the processes wait for one another")


def in_group(rank, function, world_size, store, backend, arguments):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    function(rank, world_size, *arguments)
    dist.barrier()  # a process that leaves early aborts the others' connections
    dist.destroy_process_group()


def set_environment(rank, world_size, **variables):
    """As a launcher does; the group that is there already is used."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), **variables)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")
    os.environ["ACCELERATE_USE_CPU"] = str(dist.get_backend() == "gloo")
