"""Several processes training one model: the steps of one process, output from one of them, complete files."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_pretrain import TINY

from m2r2kit.pocket import tokenizer as tokens
from m2r2kit.pocket.pretrain import Run
from m2r2kit.text.corpus import Document

SETTINGS = replace(TINY, vocabulary=300, tokens=64 * 100_000, grow_from=4)


@pytest.fixture
def run(tmp_path):
    """A run after its first step, with its tokens, as `train backbone` leaves it."""
    documents = [
        Document(kind, f"{kind} {i}", f"<|user|>What is {i}?<|assistant|>It is {i}.")
        for kind in ("code", "arithmetic", "shell")
        for i in range(200)
    ]
    _, ids = tokens.prepare(tmp_path, lambda: documents, SETTINGS.vocabulary)
    run = Run(tmp_path, SETTINGS, tokens.Batches(ids))
    run.train_step()
    run.save()
    return run


def start(folder, *more) -> subprocess.Popen:
    command = [sys.executable, "-m", "m2r2kit", "train", "backbone", "--out", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_take_the_step_of_one(run):
    process = start(run.folder, "--processes", "2", "--minutes", "1e-9")
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.count("Saved after 128 of") == 1
    before = {name: mx.array(w) for name, w in tree_flatten(run.parameters)}
    run.train_step()
    together = Run(run.folder)
    assert (together.step, together.seen) == (2, 128)
    for name, weight in tree_flatten(together.parameters):
        alone = dict(tree_flatten(run.parameters))[name]
        step = mx.abs(alone - before[name]).max().item()
        assert step > 0 and mx.abs(alone - weight).max().item() < 0.02 * step, name


def test_an_interrupt_reaches_all_and_one_saves(run):
    process = start(run.folder, "--processes", "2")
    seen = ""
    while "loss=" not in seen and process.poll() is None:  # both are in the midst of it
        seen += process.stderr.read(1)
    os.kill(process.pid, signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "resume with: m2r2kit train backbone" in out and "--processes 2" in out
    state = json.loads((run.folder / "run.json").read_text())
    assert state["step"] > 1 and (run.folder / state["arrays"]).exists()
    assert Run(run.folder).step == state["step"]


def test_processes_that_cannot_share_a_batch_are_one_sentence(run):
    process = start(run.folder, "--processes", "3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.strip() == (
        "m2r2kit: 8 windows per step cannot be divided among 3 processes; "
        "choose a number of processes that divides them"
    )
