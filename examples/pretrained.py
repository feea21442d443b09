"""A pretrained model with long contexts for less: heads that copy from afar keep full attention, the others a window.

    python examples/pretrained.py --model HuggingFaceTB/SmolLM2-135M                       # minutes on a CPU
    python examples/pretrained.py --model HuggingFaceTB/SmolLM2-135M --context_length 32768      # on a GPU

Ranks the heads of a Llama-family model on a text, converts the model, and measures both on the rest of the text.
Nothing is trained.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from measurements import token_losses
from text_files import standard_library_files
from training import check_conversion, stretched_positions
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from longnet_hf import LongNetForCausalLM, rank_heads


@dataclass
class Arguments:
    """What is converted, and how."""

    model: str = field(default="HuggingFaceTB/SmolLM2-135M", metadata={"help": "A Llama-family model."})
    text_file: str | None = field(default=None, metadata={"help": "A long text. Default: Python's standard library."})
    context_length: int = field(default=2048, metadata={"help": "Tokens to read, twice: to rank, and to measure."})
    share: float = field(default=0.2, metadata={"help": "Share of the heads that keep full attention."})
    window: int | None = field(default=None, metadata={"help": "Of the other heads. Default: 1/15 of the context."})
    output_dir: str = field(default="runs/pretrained", metadata={"help": "Where the converted model is saved."})

    def __post_init__(self):
        check_conversion(self.context_length, self.share)
        if self.window is not None and self.window < 1:
            raise ValueError(f"`--window` must be at least 1, got {self.window}.")


def measure(name: str, model, ids: torch.Tensor) -> None:
    """Print the loss of the second half of a context."""
    start = time.perf_counter()
    losses, _ = token_losses(model, ids[0], ids.shape[1] // 2)
    print(f"{name}: {losses.mean():.3f} nats per token, {time.perf_counter() - start:.1f} s")


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = [args.text_file] if args.text_file else sorted(standard_library_files())
    text = "".join(Path(file).read_text(errors="replace") for file in files)[: 16 * args.context_length]
    ids = tokenizer(text, return_tensors="pt").input_ids.to(device)[:, : 2 * args.context_length]
    if ids.shape[1] < 2 * args.context_length:
        raise ValueError(f"The text has {ids.shape[1]} tokens, and needs {2 * args.context_length}.")
    to_rank, to_measure = ids.split(args.context_length, dim=1)

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    # YaRN, if the context is longer than the model's own
    stretched = stretched_positions(AutoConfig.from_pretrained(args.model), args.context_length)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, **stretched).to(device)

    ranking = rank_heads(model, to_rank)
    print(ranking)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    ranking.save(Path(args.output_dir, "ranking.json"))
    ranking.draw().savefig(Path(args.output_dir, "ranking.png"), dpi=150)

    pattern = dict(segment_lengths=[args.window or args.context_length // 15], dilation_rates=[1])
    pattern |= dict(branch_types=["window"], sink_tokens=4)
    windows = LongNetForCausalLM.from_llama(model, **pattern)
    longnet = LongNetForCausalLM.from_llama(model, **pattern, full_attention_heads=ranking.best(args.share))
    for name, x in (("full attention", model), ("window and sink", windows), ("with the best heads full", longnet)):
        measure(name, x.to(device), to_measure)

    longnet.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    again = AutoModelForCausalLM.from_pretrained(args.output_dir, dtype=dtype).to(device)
    output = again.generate(to_measure, max_new_tokens=40, do_sample=False)
    print(f"It goes on: {tokenizer.decode(output[0, args.context_length :])!r}")


if __name__ == "__main__":
    main()
