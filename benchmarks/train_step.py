"""Tokens per second and memory of a training step, as the sequence grows: LongNet beside a Llama of equal size.

    python benchmarks/train_step.py                                   # the paper's base model, 8 K to 1 M tokens
    python benchmarks/train_step.py --size 1b --lengths 8192 131072 --compile

One sequence per step, bfloat16 weights, AdamW, gradient checkpointing and the loss in chunks for both. Llama attends
through PyTorch's scaled_dot_product_attention (cuDNN). Needs a CUDA GPU.
"""

import argparse

import torch
from common import describe
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

from longnet_hf import LongNetConfig, LongNetForCausalLM


VOCABULARY = 100288
SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "1b": dict(hidden_size=2048, num_hidden_layers=16, num_attention_heads=16),
    "7b": dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000),  # for a CPU
}


def make_model(name: str, size: str, chunk_size: int, device: str = "cuda", **pattern) -> torch.nn.Module:
    """A model with random weights in bfloat16. LongNet has the paper's pattern unless another is given."""
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


def loss_of(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Llama's own loss would hold the logits of all positions."""
    hidden_states = model.model(input_ids).last_hidden_state
    return LongNetForCausalLM.chunked_loss(model, hidden_states[:, :-1], input_ids[:, 1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--models", nargs="+", default=["longnet", "llama"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(13, 21)])
    parser.add_argument("--longest_llama", type=int, default=2**17, help="skip Llama beyond")
    parser.add_argument("--chunk_size", type=int, default=2**15, help="of LongNet's MLPs, in tokens")
    parser.add_argument("--no_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile every layer")
    options = parser.parse_args()

    print(f"{describe('cuda')}; {options.size}, checkpointing {not options.no_checkpointing}")
    print(f"compiled {options.compile}, MLPs in chunks of {options.chunk_size}\n")
    print("| tokens | model | parameters | seconds per step | tokens per second | peak GiB |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        model = make_model(name, options.size, options.chunk_size).train()
        if not options.no_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if options.compile:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for length in options.lengths:
            if name == "llama" and length > options.longest_llama:
                continue
            input_ids = torch.randint(model.config.vocab_size, (1, length), device="cuda")

            def step(model=model, optimizer=optimizer, input_ids=input_ids):
                with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                    loss_of(model, input_ids).backward()
                optimizer.step()
                optimizer.zero_grad()

            try:
                step()
                torch.cuda.reset_peak_memory_stats()
                seconds = Timer("step()", globals={"step": step}).timeit(2).median
            except torch.cuda.OutOfMemoryError:
                print(f"| {length} | {name} | {parameters / 1e6:.0f} M | out of memory |", flush=True)
                optimizer.zero_grad()
                torch.cuda.empty_cache()
                continue
            peak = torch.cuda.max_memory_allocated() / 2**30
            columns = (
                f"{length} | {name} | {parameters / 1e6:.0f} M | {seconds:.3f} | {length / seconds:.0f} | {peak:.1f}"
            )
            print(f"| {columns} |", flush=True)


if __name__ == "__main__":
    main()
