"""Continue a text with any causal language model of Transformers; what a saved LongNet needs comes with it.

python examples/generate.py --model runs/demo/longnet --prompt_file runs/demo/prompt.txt
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed


@dataclass
class Arguments:
    model: str = field(metadata={"help": "Folder of the model, or its name on the Hub. Code that it brings is run."})
    prompt_file: str = field(metadata={"help": "The text to continue, in UTF-8."})
    max_new_tokens: int = field(default=200, metadata={"help": "How many tokens to write."})
    temperature: float = field(default=0.7, metadata={"help": "Below 1: likelier tokens more often."})
    top_p: float = field(default=0.9, metadata={"help": "Choose among the likeliest tokens that make up this share."})
    seed: int = field(default=0, metadata={"help": "Another seed, another continuation."})


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    inputs = tokenizer(Path(args.prompt_file).read_text(encoding="utf-8"), return_tensors="pt").to(model.device)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
    )[0]
    length = inputs["input_ids"].shape[1]
    print(f"\nThe last lines of a prompt of {length} tokens:\n")
    print("\n".join(tokenizer.decode(output[:length]).splitlines()[-12:]))
    print(f"\n{type(model).__name__} goes on:\n\n{tokenizer.decode(output[length:])}")


if __name__ == "__main__":
    main()
