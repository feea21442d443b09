"""Tokens per second, bytes sent and memory of a training step whose one sequence is split over P processes.

    python benchmarks/context_parallel.py                                # P = 1, 2, 4, 8, as far as there are GPUs
    python benchmarks/context_parallel.py --tokens 32768 131072 524288 --models longnet
    python benchmarks/context_parallel.py --size 7b --lora --steps 0 --models longnet --tokens 131072 196608
    python benchmarks/context_parallel.py --size tiny --tokens 8192      # on a CPU (gloo): small, to see that it runs
    python benchmarks/context_parallel.py --plan                         # what travels, counted on one CPU

The tokens per process stay the same, so the sequence grows with P: efficiency is tokens per second and process, over
those of the first P. LongNet runs in `split_sequence` (one process as ever), with w = 2048 * 4^k and r = 4^k up to the
longest sequence of its rows, beside a Llama of equal size in PyTorch's `context_parallel`, which is what Accelerate's
`ParallelismConfig(cp_size=P)` calls (it has no CPU kernel). `--models apart` gives every process a sequence of its
own ("tokens" are then those of all), which shows what FSDP2 costs alone. For all: bfloat16, weights sharded by FSDP2,
AdamW, gradient checkpointing, the loss in chunks. "MiB sent" is what attention of all layers of a LongNet sends to
other processes in a step, forward and backward.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import describe
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.multiprocessing import ProcessRaisedException
from train_step import SIZES, make_model

from longnet_hf import DilatedPattern, LongNetForCausalLM, SequenceSplit, split_sequence
from longnet_hf.context_parallel import LAYOUTS, whole_rows


def pattern_for(length: int) -> dict[str, list[int]]:
    """As sparse as they are long, up to the whole sequence: what travels does not grow with it."""
    lengths = [w for w in (2048 << 2 * i for i in range(12)) if w < length] + [length]
    return {"segment_lengths": lengths, "dilation_rates": [-(-w // 2048) for w in lengths]}


def print_plan(tokens: int, processes: list[int]) -> None:
    """What a process gets from others in a layer, of the base model in bfloat16, as the sequence grows with P."""
    print("| processes | tokens | layout | MiB a process gets per layer and direction | full attention, ring |")
    print("|---|---|---|---|---|")
    for world_size in processes:
        length = tokens * world_size
        pattern = DilatedPattern(*pattern_for(length).values())
        for layout in LAYOUTS:
            received = []
            for rank in range(world_size):
                split = SequenceSplit(length, world_size, rank, layout)
                rows = whole_rows(split, 1).exchange(pattern.canonical(), 12, torch.device("cpu")).receive_splits
                received.append((sum(rows) - rows[rank]) * 2 * 64 * 2 / 2**20)
            ring = (world_size - 1) * tokens * 12 * 2 * 64 * 2 / 2**20
            print(f"| {world_size} | {length} | {layout} | {min(received):.1f}–{max(received):.1f} | {ring:.0f} |")


@contextmanager
def bytes_sent(rank: int) -> Iterator[list[int]]:
    """What this process sends to others meanwhile, in every exchange of keys, values and their gradients. Not seen by
    a mode of dispatch: under one, LongNet keeps no results that a checkpoint would compute, and send, again."""
    exchange, sent = dist.all_to_all_single, []

    def counted(output, x, receive, send, **options):
        sent.append((sum(send) - send[rank]) * x[:1].nbytes)
        return exchange(output, x, receive, send, **options)

    with patch.object(dist, "all_to_all_single", counted):
        yield sent


class WithLoss(torch.nn.Module):
    """One module for FSDP to unshard, whose loss never holds the logits of all positions."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **inputs):
        hidden_states = self.model.model(input_ids, **inputs).last_hidden_state
        return LongNetForCausalLM.chunked_loss(self.model, hidden_states, input_ids)


def measure(rank: int, world_size: int, name: str, tokens: int, longest: int, options, store: str, result: str):
    """A row of the table, which process 0 writes to the file `result`. Rows up to `longest` have one pattern."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, os.cpu_count() // world_size))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        device_id=device if on_gpu else None,  # or NCCL warns, in the middle of the table
    )
    mesh = init_device_mesh(device.type, (world_size,))
    is_llama = name == "llama"
    pattern = {} if is_llama else pattern_for(longest)
    model = make_model("llama" if is_llama else "longnet", options.size, options.chunk_size, device.type, **pattern)
    model.train()
    if options.lora:
        inject_adapter_in_model(LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]), model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    module = fully_shard(WithLoss(model), mesh=mesh)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW([x for x in module.parameters() if x.requires_grad], lr=1e-4)
    length = tokens * world_size
    ids = torch.randint(model.config.vocab_size, (1, length), device=device)

    def step():
        if not is_llama:
            is_split = name == "longnet" and world_size > 1
            with split_sequence(layout=options.layout) if is_split else nullcontext():
                module(ids[:, :tokens]).backward()
        else:
            whole, position_ids = ids.clone(), torch.arange(length, device=device)[None]
            split = nullcontext()
            if world_size > 1:
                buffers = dict(buffers=[whole, position_ids], no_restore_buffers={whole, position_ids})
                split = context_parallel(mesh, buffer_seq_dims=[1, 1], **buffers)
            with split:
                # Without a mask, Transformers takes parts of a sequence for packed documents, and makes one of N^2
                mask = torch.ones_like(whole)
                module(whole, position_ids=position_ids, attention_mask=mask).backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds() -> float:
        dist.barrier()
        began = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    with bytes_sent(rank) as sent:
        times = [seconds()]
    if options.steps:
        seconds()
        times = [seconds() for _ in range(options.steps)]
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0, device=device)
    most = torch.tensor([float(sum(sent)), sorted(times)[len(times) // 2]], device=device)
    for x in (peak, most):
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    if rank == 0:
        with open(result, "w") as file:
            file.write(" ".join(map(str, (*most.tolist(), peak.item()))))
    dist.barrier()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--models", nargs="+", choices=["longnet", "apart", "llama"], default=["longnet", "llama"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**17], help="per process")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of LongNet's sequences")
    parser.add_argument("--chunk_size", type=int, default=2**15, help="of LongNet's MLPs, in tokens")
    parser.add_argument("--steps", type=int, default=3, help="to take the median of, after two; 0 times the first one")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 16 on attention alone")
    parser.add_argument("--plan", action="store_true", help="only count what travels")
    options = parser.parse_args()
    if options.plan:
        for tokens in options.tokens:
            print_plan(tokens, options.processes)
        return

    on_gpu, available = torch.cuda.is_available(), torch.cuda.device_count() or 8
    print(f"{describe('cuda' if on_gpu else 'cpu')}; {options.size}{', LoRA' * options.lora}, {options.layout}\n")
    if not on_gpu:
        print(f"No GPU: the processes share {os.cpu_count()} CPU cores, so that times say little. Without Llama.\n")
    print("| processes | tokens | model | seconds per step | tokens per second | efficiency | MiB sent | peak GiB |")
    print("|---|---|---|---|---|---|---|---|")
    models = options.models if on_gpu else [name for name in options.models if name != "llama"]
    for name, tokens in itertools.product(models, options.tokens):
        first, processes = None, [x for x in options.processes if x <= available]
        for world_size in processes:
            row = [world_size, tokens * world_size, name]  # printed at once: processes have warnings to give
            with tempfile.TemporaryDirectory() as folder:
                files = os.path.join(folder, "store"), os.path.join(folder, "result")
                arguments = world_size, name, tokens, tokens * max(processes), options, *files
                try:
                    torch.multiprocessing.spawn(measure, args=arguments, nprocs=world_size)
                except ProcessRaisedException as error:
                    if "OutOfMemoryError" not in str(error):
                        raise
                    row.append("out of memory")
                else:
                    with open(files[1]) as file:
                        sent, seconds, peak = map(float, file.read().split())
                    speed = tokens * world_size / seconds
                    first = first or speed / world_size
                    row += [f"{seconds:.3f}", f"{speed:.0f}", f"{speed / world_size / first:.2f}"]
                    row += [f"{sent / 2**20:.2f}" if name != "llama" else "–", f"{peak:.1f}" if on_gpu else "–"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
