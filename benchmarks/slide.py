"""Time and memory of GigaPath's slide encoder (12 layers, 768 wide, 16 heads) as slides grow.

    python benchmarks/slide.py                                            # 10 000, 45 680 and 70 000 tiles
    python benchmarks/slide.py --tiles 45680 --attentions longnet --dtype float16

One slide per step, with the segment lengths for slides of up to 262 144 pixels a side, the keys of zeros that its
weights were trained with, and checkpointing of activations unless it is switched off. `gather` is the same model with
attention as it was published: kept rows copied, flash attention per branch, scattered, and mixed. Needs a CUDA GPU.
"""

import argparse

import torch
from attention import gather_attention
from common import describe, milliseconds

from longnet_hf import LongNetSlideConfig, LongNetSlideModel, modeling_longnet


def published_attention(module, query, key, value, layout, scaling, **kwargs):
    """An attention function of LongNet: [B, H, N, D] -> [B, N, H, D]."""
    return gather_attention(query, key, value, module.pattern, module.is_causal).transpose(1, 2), None


ATTENTIONS = {"longnet": modeling_longnet.dilated_attention_forward, "gather": published_attention}


def make_model(dtype: torch.dtype, layers: int) -> LongNetSlideModel:
    config = LongNetSlideConfig(head_offset="grouped", segment_padding="zeros", num_hidden_layers=layers)
    return LongNetSlideModel(config).to("cuda", dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[10_000, 45_680, 70_000])
    parser.add_argument("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--no_checkpointing", action="store_true")
    options = parser.parse_args()

    checkpointing = not options.no_checkpointing
    print(f"{describe('cuda')}; {options.layers} layers, {options.dtype}, checkpointing {checkpointing}\n")
    print("| tiles | attention | forward ms | peak GiB | forward + backward ms | peak GiB |")
    print("|---|---|---|---|---|---|")
    model = make_model(getattr(torch, options.dtype), options.layers)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for tiles in options.tiles:
        features = torch.randn(1, tiles, model.config.feature_size, device="cuda", dtype=model.dtype)
        coords = torch.randint(model.config.grid_size, (1, tiles, 2), device="cuda") * model.config.tile_size
        for name in options.attentions:
            for implementation in ("dilated", "sdpa"):
                modeling_longnet.ALL_ATTENTION_FUNCTIONS[implementation] = ATTENTIONS[name]

            def forward(features=features, coords=coords):
                with torch.no_grad():
                    model.eval()(features, coords)

            def both(features=features, coords=coords):
                model.zero_grad()
                model.train()(features, coords).pooler_output.float().square().sum().backward()

            columns = [tiles, name]
            for run in (forward, both):
                try:
                    run()
                    torch.cuda.reset_peak_memory_stats()
                    columns += [f"{milliseconds(run, 1):.0f}", f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"]
                except torch.cuda.OutOfMemoryError:
                    columns += ["out of memory", ""]
                    torch.cuda.empty_cache()
            print("|", " | ".join(map(str, columns)), "|", flush=True)


if __name__ == "__main__":
    main()
