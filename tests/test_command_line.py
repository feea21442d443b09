"""`python -m longnet_hf TOOL`: tools that cannot import the package load its models all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from models import build

from longnet_hf import LongNetForCausalLM, __main__, set_dilated_attention


TOOL = """
import importlib.util, json, subprocess, sys

def main():
    assert importlib.util.find_spec("transformers")
    import transformers
    longnet, exchanged, *depth = sys.argv[1:]
    found = getattr(transformers, transformers.AutoConfig.from_pretrained(longnet).architectures[0])
    dilated = transformers.AutoModelForCausalLM.from_pretrained(exchanged, attn_implementation=None)
    loaded = [type(found.from_pretrained(longnet)).__name__, dilated.config._attn_implementation]
    print(json.dumps(loaded + [sys.modules["sitecustomize"].others_run if depth else sys.argv[0]]), flush=True)
    if not depth:
        return subprocess.call([sys.executable, __file__, longnet, exchanged, "child"])

if __name__ == "__main__":
    main()
"""


def test_a_tool_and_the_processes_that_it_starts_know_the_models(tmp_path):
    build(LongNetForCausalLM).save_pretrained(tmp_path / "longnet")
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    set_dilated_attention(llama, segment_lengths=[8, 16], dilation_rates=[1, 2]).save_pretrained(tmp_path / "llama")
    (tmp_path / "some_tool.py").write_text(TOOL)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['sitecustomize'].others_run = 'ours too'")
    (tmp_path / "some_tool-1.dist-info").mkdir()
    (tmp_path / "some_tool-1.dist-info" / "METADATA").write_text("Name: some-tool\nVersion: 1\n")
    (tmp_path / "some_tool-1.dist-info" / "entry_points.txt").write_text(
        "[console_scripts]\nsome-tool = some_tool:main"
    )
    root = Path(__main__.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(root)))}
    command = [sys.executable, "-m", "longnet_hf", "some-tool", tmp_path / "longnet", tmp_path / "llama"]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert loaded == [["LongNetForCausalLM", "dilated", name] for name in ("some-tool", "ours too")]


@pytest.mark.parametrize("arguments", [[], ["no-such-tool", "x"]])
def test_a_tool_that_is_not_there_is_named(arguments):
    with pytest.raises(SystemExit, match="usage: python -m longnet_hf TOOL") as refused:
        __main__.main(arguments)
    assert arguments == [] or "'no-such-tool'" in refused.value.code
