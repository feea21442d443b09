"""Stream a billion tokens through a LongNet in memory that does not grow.

    python examples/one_billion_tokens.py                                   # the paper's base model, on a GPU
    python examples/one_billion_tokens.py --tokens 1_000_000 --size small   # a million, on a CPU

The largest segment is the whole stream, so that the last token is joined to the first ones. Tokens are random, a
function of their positions. What was read is saved every `save_every` chunks, so that the same command goes on where
it was interrupted. Ends with a record of hardware, time, memory and keys kept, in JSON.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from record import environment, peak_gibibytes, read, write
from tqdm.auto import tqdm
from training import check_at_least
from transformers import HfArgumentParser, set_seed

from longnet_hf import DilatedCache, LongNetConfig, LongNetForCausalLM


SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, vocab_size=64000),
    "small": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000),
}


@dataclass
class Arguments:
    tokens: str = field(default="1_000_000_000", metadata={"help": "Length of the stream."})
    size: str = field(
        default="base",
        metadata={"help": "Of the model: base (the paper's, 134 M parameters), or small; random weights."},
    )
    chunk_size: int = field(default=1 << 20, metadata={"help": "Tokens per forward pass."})
    segment_length: int = field(default=2048, metadata={"help": "Of the first branch; each next is 4 times as long."})
    output_dir: str = field(default="runs/one_billion_tokens", metadata={"help": "For the record and what was read."})
    save_every: int = field(default=300, metadata={"help": "Save after so many chunks."})
    stop_after: float | None = field(default=None, metadata={"help": "Seconds after which to save and stop."})
    mlp_chunk_size: int = field(default=1 << 18, metadata={"help": "Tokens per pass through an MLP."})

    def __post_init__(self):
        check_at_least(self, chunk_size=1, segment_length=1, save_every=1, mlp_chunk_size=0)
        if not self.tokens.replace("_", "").isdecimal() or int(self.tokens) < 1:
            raise ValueError(f"`--tokens` must be an integer of at least 1, got {self.tokens!r}.")
        if self.size not in SIZES:
            raise ValueError(f"`--size` must be one of {list(SIZES)}, got {self.size!r}.")


def make_config(args: Arguments, tokens: int) -> LongNetConfig:
    """w = 2048 * 4^k, r = 4^k, up to a last segment that holds the stream: a multiple of the chunks."""
    length, rate, lengths, rates = args.segment_length, 1, [], []
    while length < tokens:
        lengths.append(length)
        rates.append(rate)
        length, rate = 4 * length, 4 * rate
    whole = -(-tokens // args.chunk_size) * args.chunk_size
    lengths.append(whole)
    rates.append(-(-whole // args.segment_length))
    return LongNetConfig(
        **SIZES[args.size],
        intermediate_size=4 * SIZES[args.size]["hidden_size"],
        segment_lengths=lengths,
        dilation_rates=rates,
        max_position_embeddings=whole,
        chunk_size_feed_forward=args.mlp_chunk_size,
    )


def remove_other_caches(folder: Path, name: str) -> None:
    """Older ones, and those that an interruption left behind."""
    for file in folder.glob("cache_*"):
        if file.name != name:
            file.unlink()


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    tokens, device = int(args.tokens), "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    set_seed(0)
    with torch.device(device):
        model = LongNetForCausalLM(make_config(args, tokens)).eval()
    model.to(torch.bfloat16 if device == "cuda" else torch.float32)

    if device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    state_file, cache = folder / "state.json", DilatedCache(model.config, reserve=0)
    state = {"tokens": 0, "seconds": 0.0, "peak_gibibytes": 0.0, "cache": ""}
    if state_file.exists():
        state = read(state_file)
        cache = DilatedCache.load(folder / state["cache"], model)
        print(f"Going on at token {state['tokens']:,}")
    remove_other_caches(folder, state["cache"])

    began, earlier = time.perf_counter(), state["seconds"]

    def save(done: int) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        file = folder / f"cache_{done}.safetensors"
        state.update(tokens=done, seconds=earlier + time.perf_counter() - began, cache=file.name)
        state["peak_gibibytes"] = max(state["peak_gibibytes"], peak_gibibytes(device))
        cache.save(file, model)
        write(state_file, state)
        remove_other_caches(folder, state["cache"])

    generator = torch.Generator(device)
    with torch.no_grad(), tqdm(total=tokens, initial=state["tokens"], unit=" tokens", unit_scale=True) as bar:
        for number, start in enumerate(range(state["tokens"], tokens, args.chunk_size), start=1):
            stop = min(start + args.chunk_size, tokens)
            shape = 1, stop - start
            ids = torch.randint(model.config.vocab_size, shape, generator=generator.manual_seed(start), device=device)
            # A last chunk of another length is not worth compiling for
            with torch.compiler.set_stance("default" if shape[1] == args.chunk_size else "force_eager"):
                last = model(ids, past_key_values=cache, logits_to_keep=1).logits
            bar.update(stop - start)
            is_late = args.stop_after is not None and time.perf_counter() - began > args.stop_after
            if number % args.save_every == 0 or stop == tokens or is_late:
                if not bool(last.isfinite().all()):
                    raise RuntimeError(f"The logits of token {stop - 1:,} are not finite.")
                save(stop)
            if is_late and stop < tokens:
                print(f"Stopped at token {stop:,}. The same command goes on from there.")
                return

    branches = zip(model.config.segment_lengths, model.config.dilation_rates, strict=True)
    record = {
        "tokens": tokens,
        "seconds": round(state["seconds"], 1),
        "tokens_per_second": round(tokens / state["seconds"]),
        "peak_gibibytes": round(state["peak_gibibytes"], 2),
        "keys_kept_per_head_and_layer": model.config.layer_patterns[0].max_live_keys(),
        "branches": list(branches),
        "parameters": model.num_parameters(),
        "arguments": {name: value for name, value in asdict(args).items() if name != "output_dir"},
        "date": time.strftime("%Y-%m-%d"),
    } | environment(device)
    write(folder / "record.json", record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
