"""Milliseconds per token and bytes of cache as the context grows: LongNet beside a Llama of equal size.

    python benchmarks/decode.py                                  # the paper's base model, 1 K to 1 M tokens of context
    python benchmarks/decode.py --batch_size 8 --lengths 1024 32768

One step of greedy decoding, batch 1, bfloat16. LongNet reads the context in chunks and keeps what its pattern asks for
(DilatedCache); "longnet-heads" has full attention in a fifth of the heads, for which the cache has room, and a window
and a sink in the others. Llama attends through PyTorch's flash attention (cuDNN would plan anew for every length); its
DynamicCache is filled with random numbers, since reading a long context would take it minutes. "compiled" steps are
those of `generate(compile_config=CompileConfig())`: torch.compile and CUDA graphs, which a cache of growing size rules
out. Needs a CUDA GPU.
"""

import argparse

import torch
from common import describe, milliseconds
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step import SIZES, make_model
from transformers import CompileConfig, DynamicCache

from longnet_hf import DilatedCache


ROOM = 8192  # tokens that are decoded at most


def cache_bytes(cache) -> int:
    holders = [part for layer in cache.layers for part in getattr(layer, "parts", [layer])]
    return sum(x.numel() * x.element_size() for holder in holders for x in (holder.keys, holder.values))


def read(model, length: int, batch_size: int, chunk_size: int):
    """A cache that holds `length` tokens."""
    if model.config.model_type == "longnet":
        cache = DilatedCache(model.config, max_length=length + ROOM)
        for start in range(0, length, chunk_size):
            size = min(chunk_size, length - start)
            model.model(
                torch.randint(model.config.vocab_size, (batch_size, size), device="cuda"), past_key_values=cache
            )
        return cache
    cache, heads = DynamicCache(config=model.config), model.config.num_key_value_heads
    for layer_idx in range(model.config.num_hidden_layers):
        shape = batch_size, heads, length, model.config.head_dim
        cache.update(*(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)), layer_idx)
    return cache


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--models", nargs="+", default=["longnet", "longnet-heads", "llama"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**10, 2**15, 2**17, 2**20])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--chunk_size", type=int, default=2**17, help="tokens that LongNet reads at a time")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--seconds", type=float, default=1.0, help="to measure for")
    options = parser.parse_args()

    print(f"{describe('cuda')}; {options.size}, batch {options.batch_size}\n")
    print("| context | model | ms per token | compiled | cache MiB |")
    print("|---|---|---|---|---|")
    for name in options.models:
        model = make_model(name, options.size, chunk_size=2**15).eval()
        forwards, backends = [model.__call__], [SDPBackend.FLASH_ATTENTION]
        if name != "llama":
            backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
            if not options.eager:
                forwards.append(model.get_compiled_call(CompileConfig()))
        for length in options.lengths:
            try:
                cache = read(model, length, options.batch_size, options.chunk_size)
                times = []
                for forward in forwards:
                    token = torch.zeros(options.batch_size, 1, dtype=torch.long, device="cuda")

                    def step(forward=forward, token=token, cache=cache, backends=backends):
                        with sdpa_kernel(backends):
                            logits = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
                        token.copy_(logits.argmax(-1))

                    for _ in range(3):
                        step()
                    times.append(f"{milliseconds(step, options.seconds):.2f}")
                megabytes = f"{cache_bytes(cache) / 2**20:.0f}"
            except torch.cuda.OutOfMemoryError:
                times, megabytes = ["out of memory"], ""
            print(f"| {length} | {name} | {times[0]} | {(times[1:] or [''])[0]} | {megabytes} |", flush=True)
            cache = None
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
