"""The examples run, resume and refuse as their users expect, in miniature."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytest.importorskip("datasets"), pytest.importorskip("matplotlib")
ROOT = Path(__file__).parent.parent
TINY = (
    *("--vocab_size", "300", "--hidden_size", "16", "--intermediate_size", "32", "--num_hidden_layers", "1"),
    *("--num_attention_heads", "2", "--segment_lengths", "16", "64", "--dilation_rates", "1", "2"),
    *("--context_length", "128", "--max_held_out_contexts", "2", "--save_steps", "2", "--logging_steps", "1"),
    *("--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
)


def run(script, *arguments, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_training_goes_on_where_it_was_stopped(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i, path in enumerate(sorted((ROOT / "longnet_hf").glob("*.py"))):
        (data / f"{i}.txt").write_text(path.read_text())
    common = ("--data", data, "--output_dir", "run", "--max_steps", 4, "--held_out", 0.3, *TINY)
    done = run("train.py", *common, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bits per byte, by position" in done.stdout and "64-127" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"longnet", "local-only"}
    assert (tmp_path / "run" / "loss_by_position.png").stat().st_size > 10_000
    assert (tmp_path / "run" / "longnet" / "modeling_longnet.py").exists()

    # as if the first model had been stopped after its second step
    trained = tmp_path / "run" / "longnet"
    (trained / "train_results.json").unlink()
    for path in (trained / "checkpoint-4").iterdir():
        path.unlink()
    done = run("train.py", *common, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "checkpoint-2" in done.stdout
    again = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in results:
        assert again[name]["bits_per_byte"] == pytest.approx(results[name]["bits_per_byte"], rel=1e-6)

    refused = run("train.py", *common, "--learning_rate", 0.5, folder=tmp_path)
    assert refused.returncode != 0 and "learning_rate was 0.01, is 0.5" in refused.stderr


def test_data_that_is_not_there_is_named(tmp_path):
    done = run("train.py", "--data", "no/such/file.txt", *TINY, folder=tmp_path)
    assert done.returncode != 0 and "no/such/file.txt" in done.stderr


def test_the_picture_of_the_readme(tmp_path):
    done = run("draw_pattern.py", "--output", "pattern.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "pattern.png").read_bytes()[:4] == b"\x89PNG"


def test_a_stream_goes_on_where_it_was_stopped(tmp_path):
    common = ("--tokens", "40_000", "--size", "small", "--chunk_size", 4096, "--segment_length", 256)
    caches = []
    for folder, stops in (("whole", ()), ("stopped", (("--stop_after", 0),))):
        for stop in (*stops, ()):
            done = run("one_billion_tokens.py", *common, "--output_dir", folder, *stop, folder=tmp_path)
            assert done.returncode == 0, done.stderr[-2000:]
        (tmp_path / folder / "record.json").unlink()  # and once more when there is nothing left to read
        again = run("one_billion_tokens.py", *common, "--output_dir", folder, folder=tmp_path)
        assert again.returncode == 0, again.stderr[-2000:]
        record = json.loads((tmp_path / folder / "record.json").read_text())
        assert record["tokens"] == 40_000 and record["branches"][-1][0] == 40_960
        (file,) = (tmp_path / folder).glob("cache_*.safetensors")
        caches.append(load_file(file))
    assert "Going on at token 4,096" in done.stdout
    assert all(torch.equal(x, caches[1][name]) for name, x in caches[0].items())
