"""Two processes give what one gives, and a death of either ends the run."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import awq

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import os, sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
import awq
folder, result, victim = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
model = AutoModelForCausalLM.from_pretrained(folder)
if rank == int(victim):     # dies in the middle of the second block
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: os._exit(9))
tokens = torch.load(f"{folder}/tokens.pt")
report = awq.quantize_model(model, tokens, 4, 64, refine="grid", progress=False)
losses = [line["loss"] for line in report["groups"]]
torch.save((model.state_dict(), losses), f"{result}/{rank}.pt")
dist.destroy_process_group()
"""


def torchrun(*command, timeout=300):
    """Two ranks of a command on this machine: the CompletedProcess of the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr",
         "127.0.0.1", "--master-port", str(port), *map(str, command)],
        env=environment, timeout=timeout, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small grouped-query model, the script, and 5 samples (an odd number) of 32 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )).save_pretrained(folder)
    torch.save(torch.randint(1024, (5, 32)), folder / "tokens.pt")
    (folder / "run.py").write_text(RUN)
    return folder


def test_two_ranks_end_with_the_weights_of_one_process(folder, tmp_path):
    done = torchrun(folder / "run.py", folder, tmp_path, -1)
    assert done.returncode == 0, done.stderr
    (first, losses), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)
    report = awq.quantize_model(model, torch.load(folder / "tokens.pt"), 4, 64, refine="grid",
                                progress=False)
    assert losses == pytest.approx([line["loss"] for line in report["groups"]], rel=1e-3)
    for name, module in model.named_modules():
        if isinstance(module, awq.AWQLinear):
            q = awq.unpack(module.qweight, 4, module.out_features)
            other = awq.unpack(first[f"{name}.qweight"], 4, module.out_features)
            assert (q != other).float().mean() < 0.02, name     # ties of the search, no more


def test_a_rank_that_dies_ends_the_run_soon_and_says_so(folder, tmp_path):
    done = torchrun(folder / "run.py", folder, tmp_path, 1)     # within its time-out
    assert done.returncode != 0
    assert "rank 0 of 2: another rank died" in done.stderr or "SIGTERM" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_line_saves_once_under_torchrun(tmp_path):
    text = tmp_path / "calibration.txt"
    text.write_text("\n\n".join(awq.load_documents("pydoc")[:30]))
    done = torchrun(ROOT / "awq.py", ROOT / "tinylm", "--save", tmp_path / "out", "--calib", text,
                    "--samples", 3, "--seq-len", 32, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    logits = awq.load_quantized(tmp_path / "out")(torch.ones(1, 4, dtype=torch.long)).logits
    assert logits.isfinite().all()


def test_more_ranks_than_samples_are_refused(monkeypatch, folder):
    from transformers import AutoModelForCausalLM
    monkeypatch.setattr(awq, "ranks", lambda: (0, 6))
    with pytest.raises(ValueError, match="tokens has 5 samples: each of 6 ranks needs one"):
        awq.quantize_model(AutoModelForCausalLM.from_pretrained(folder),
                           torch.load(folder / "tokens.pt"), 4, 64)
