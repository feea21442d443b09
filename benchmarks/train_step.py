"""Tokens per second and memory of a training step, as the sequence grows: LongNet beside a Llama of equal size.

    python benchmarks/train_step.py                                   # the paper's base model, 8 K to 1 M tokens
    python benchmarks/train_step.py --size 1b --lengths 8192 131072 --models longnet llama+liger+layers
    python benchmarks/train_step.py --lengths 131072 --profile        # and what the GPU does in that time

One sequence per step, bfloat16 weights, AdamW, gradient checkpointing for all. "longnet-heads" has full attention in a
fifth of its heads, and a window and a sink in the others. Llama attends through PyTorch's scaled_dot_product_attention
(cuDNN). A model's name says what it runs with: `+layers` compiles every layer, `+whole` all layers as one graph, as
`TrainingArguments(torch_compile=True)` does; `+graph` captures the whole step, with loss and optimizer, as a CUDA
graph, which is replayed without the CPU; `+liger` is Liger's kernels and loss (`pip install liger-kernel`), without
which Llama has this project's loss.

MFU: the operations of the matrix products and of the pairs that attend, forward and backward, recomputation not
counted, over the 989 TFLOP/s of an H100. Needs a CUDA GPU.
"""

import argparse
import re

import torch
from common import captured, describe, timer
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from longnet_hf import LongNetConfig, LongNetForCausalLM


VOCABULARY = 100288
SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16),
    "7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000),  # for a CPU
}
MODELS = [
    *("longnet", "longnet+layers", "longnet+whole", "longnet-heads", "longnet-heads+layers"),
    *("llama", "llama+layers", "llama+whole", "llama+liger", "llama+liger+layers"),
    *("longnet+graph", "longnet-heads+graph", "llama+graph"),  # Transformers compiles anew while a graph is captured
]
PEAK = 989e12  # bfloat16 operations a second, dense, of an H100
# Kernels by name
ATTENTION = re.compile(r"_(query|key|sink|stats)_kernel|flash|fmha|sdpa|attention", re.IGNORECASE)
PRODUCTS = re.compile(r"gemm|cutlass|nvjet|cublas|xmma|splitK|_mm", re.IGNORECASE)
LOSS = re.compile(r"cross_entropy", re.IGNORECASE)


def window_with_full_heads(num_layers: int, num_heads: int) -> dict:
    """The fields of a LongNet with full attention in a fifth of the heads, as good as spread over the layers, and a
    window of 2209 tokens and a sink of 4 in the others."""
    full = [round(num_heads * (layer + 1) / 5) - round(num_heads * layer / 5) for layer in range(num_layers)]
    return dict(
        segment_lengths=[2209],
        dilation_rates=[1],
        branch_types=["window"],
        sink_tokens=4,
        full_attention_heads={layer: list(range(count)) for layer, count in enumerate(full)},
    )


def make_model(name: str, size: str, chunk_size: int, device: str = "cuda", **pattern) -> torch.nn.Module:
    """A model with random weights in bfloat16. LongNet has the paper's pattern unless another is given, and
    "longnet-heads" that of [`window_with_full_heads`]."""
    if name == "longnet-heads":
        pattern |= window_with_full_heads(SIZES[size]["num_hidden_layers"], SIZES[size]["num_attention_heads"])
        name = "longnet"
    shape = dict(vocab_size=VOCABULARY, tie_word_embeddings=True, use_cache=False) | SIZES[size]
    width = shape["hidden_size"]
    if name == "longnet":
        config = LongNetConfig(**shape, **pattern, intermediate_size=4 * width, chunk_size_feed_forward=chunk_size)
        model_class = LongNetForCausalLM
    else:  # three projections in place of two, hence 2/3 as wide
        config = LlamaConfig(**shape, intermediate_size=8 * width // 3, max_position_embeddings=2**20)
        model_class = LlamaForCausalLM
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = model_class(config)
    torch.set_default_dtype(torch.float32)
    return model


def loss_of(model: torch.nn.Module, input_ids: torch.Tensor, own_loss: bool = False) -> torch.Tensor:
    """Llama's own loss would hold the logits of all positions, unless it is Liger's."""
    if own_loss:
        return model(input_ids, labels=input_ids).loss
    hidden_states = model.model(input_ids).last_hidden_state
    return LongNetForCausalLM.chunked_loss(model, hidden_states[:, :-1], input_ids[:, 1:])


def operations(model: torch.nn.Module, length: int) -> float:
    """Of a training step, without what is recomputed."""
    config, base = model.config, model.get_base_model() if hasattr(model, "get_base_model") else model
    weights = sum(module.weight.numel() for module in base.modules() if isinstance(module, torch.nn.Linear))
    heads = config.num_attention_heads
    if config.model_type == "longnet":
        pairs = sum(pattern.pairs(length, heads) for pattern in base.model.patterns)
    else:
        pairs = config.num_hidden_layers * heads * length * (length + 1) // 2
    return 3 * (2 * weights * length + 4 * config.head_dim * pairs)


def profile(step) -> dict[str, float]:
    """How a step's time on the GPU is spent, in shares; the kernels it launches; and the share of the step in which
    the GPU works."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [x for x in profiler.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sorted((x for x in kernels if not x.is_user_annotation), key=lambda x: x.time_range.start)
    is_product = [bool(PRODUCTS.search(x.name) and not ATTENTION.search(x.name)) for x in kernels]
    # The loss goes from the product before the first of its own kernels to the second product after the last
    own = [i for i, x in enumerate(kernels) if LOSS.search(x.name)]
    products = [i for i, product in enumerate(is_product) if product]
    begin = max(i for i in products if i < own[0])
    end = [i for i in products if i > own[-1]][1]
    times = dict.fromkeys(("attention", "loss", "products", "elementwise"), 0.0)
    for i, kernel in enumerate(kernels):
        kind = "attention" if ATTENTION.search(kernel.name) else "products" if is_product[i] else "elementwise"
        times["loss" if begin <= i <= end else kind] += kernel.time_range.elapsed_us()
    total = sum(times.values())
    wall = max(x.time_range.end for x in kernels) - kernels[0].time_range.start
    return {name: time / total for name, time in times.items()} | {"kernels": len(kernels), "GPU works": total / wall}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(13, 21)])
    parser.add_argument("--longest_llama", type=int, default=2**17, help="skip Llama beyond")
    parser.add_argument("--chunk_size", type=int, default=2**15, help="of LongNet's MLPs, in tokens")
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="add how a step's time on the GPU is spent")
    options = parser.parse_args()

    print(f"{describe('cuda')}; {options.size}, checkpointing {not options.no_checkpointing}")
    print(f"MLPs in chunks of {options.chunk_size}\n")
    columns = ["tokens", "model", "parameters", "seconds per step", "tokens per second", "MFU", "peak GiB"]
    if options.profile:
        columns += ["attention", "loss", "other products", "elementwise", "kernels", "GPU works"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in options.models:
        kind, *added = name.split("+")
        model = make_model(kind, options.size, options.chunk_size).train()
        if not options.no_checkpointing:
            # The state of the random numbers, which nothing needs, cannot be read while a graph is captured
            options_of = {"use_reentrant": False, "preserve_rng_state": "graph" not in added}
            model.gradient_checkpointing_enable(options_of)
        if "liger" in added:
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=model)
        if "layers" in added:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        if "whole" in added:
            model.model.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable="graph" in added)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for length in options.lengths:
            if kind == "llama" and length > options.longest_llama:
                continue
            input_ids = torch.randint(model.config.vocab_size, (1, length), device="cuda")
            own_loss = model.config.model_type == "longnet" or "liger" in added

            def step(model=model, optimizer=optimizer, input_ids=input_ids, own_loss=own_loss):
                with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                    loss_of(model, input_ids, own_loss).backward()
                optimizer.step()
                optimizer.zero_grad()

            row = [length, name, f"{parameters / 1e6:.0f} M"]
            try:
                step()
                step()
                torch.cuda.reset_peak_memory_stats()
                if "graph" in added:
                    step = captured(step)
                repeats = max(2, 2**18 // length)
                seconds = timer(step).timeit(repeats).median
            except torch.cuda.OutOfMemoryError:
                print(f"| {' | '.join(map(str, row))} | out of memory |", flush=True)
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                continue
            mfu = operations(model, length) / seconds / PEAK
            peak = torch.cuda.max_memory_allocated() / 2**30
            row += [f"{seconds:.3f}", f"{length / seconds:.0f}", f"{mfu:.1%}", f"{peak:.1f}"]
            if options.profile:
                found = profile(step)
                row += [f"{found.pop(share):.0%}" for share in ("attention", "loss", "products", "elementwise")]
                row += [found["kernels"], f"{found['GPU works']:.0%}"]
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
