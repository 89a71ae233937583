"""Training expert predictors: training pass and decoding predict the same, and recall rises."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
import tiny_experts
from mlx.utils import tree_flatten, tree_map

from m2r2kit.__main__ import main
from m2r2kit.bench import records
from m2r2kit.bench.experts import ARMS, Disk, compare
from m2r2kit.cli import train_predictor
from m2r2kit.common import UserError
from m2r2kit.experts import registry as methods
from m2r2kit.experts import train as learn
from m2r2kit.experts import trained
from m2r2kit.experts.decode import ExpertDecoder, StreamedModel
from m2r2kit.experts.packing import pack
from m2r2kit.experts.reader import Reader
from m2r2kit.experts.state_predictors import (
    DirectConfig,
    DirectMap,
    NextRouter,
    StreamPredictor,
    router,
    turns,
)
from m2r2kit.experts.trace import Trace
from m2r2kit.model.backbone import Backbone
from m2r2kit.stream import checkpoints
from m2r2kit.stream.distil import DistilConfig
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig, load_stream

ROWS = np.array([tiny.prompt(24, seed) for seed in range(6)])


def view() -> Backbone:
    return tiny_experts.resident("mixtral")


def batches() -> list[learn.RouterTeacherBatch]:
    return [learn.teacher_batch(view(), ROWS[i : i + 2]) for i in (0, 2)]


def shaken(module, size=0.3):
    mx.random.seed(7)
    module.update(tree_map(lambda w: w + size * mx.random.normal(w.shape), module.trainable_parameters()))
    return module


def test_the_teacher_runs_the_model_itself():
    batch = learn.teacher_batch(view(), ROWS[:2])
    right = view().states(mx.array(ROWS[:2]))
    for ours, its in zip(batch.states, right, strict=True):
        assert mx.allclose(ours, its, atol=1e-5)
    assert set(batch.logits) == set(range(tiny.BLOCKS))


@pytest.mark.parametrize("rate", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["stream", "deep", "carried", "adapter", "anew", "anew, carried", "direct"])
def test_decoding_names_what_the_forced_pass_names(kind, rate):
    """The same stream over whole sequences, as in training, and token by token, as in decoding."""
    family = "mixtral"
    model = StreamedModel(tiny_experts.model(family), tiny_experts.store(family))

    def made(backbone):
        mx.random.seed(5)
        config = {
            "deep": {"deep": 0.75},
            "carried": {"carry": True},
            "anew": {"rank": 0, "exits": (1, 2, 3)},  # each begins at the slow stream's own u
            "anew, carried": {"rank": 0, "exits": (1, 2, 3), "carry": True},
        }.get(kind, {})
        config = StreamConfig(**{
            "form": "adapter" if kind == "adapter" else "attention", "exits": (2, 3), "rate": rate, "rank": 4,
            "ffn_width": 8, "deep": 0.0, "carry": False, **config,
        })  # fmt: skip
        stream = shaken(AcceleratedStream(backbone, config))
        return shaken(DirectMap.like(stream)) if kind == "direct" else StreamPredictor(stream)

    m = model.store.manifest
    trace, prompt = Trace(m.blocks, m.experts, m.top_k), tiny.prompt(7)
    with Reader(model.store, "buffered") as r:
        residency = model.residency(m.experts, methods.policy("lru"))
        decoder = ExpertDecoder(model, residency, r, made(model.backbone), trace)
        tokens = decoder.generate(prompt, 10).tokens
    text = [*prompt, *tokens][: len(prompt) + 9]
    forced, batch = made(view()), learn.teacher_batch(view(), np.array([text]))
    over = forced.over(batch.states, batch.after, batch.cache)
    for i, p in enumerate(trace.passes[1:]):
        at = len(prompt) - 1 + i
        for l, named in zip(m.blocks, p.predicted[1:]):
            assert [target for target, _ in named] == forced.targets(l)
            for target, experts in named:
                logits = router(view(), target, over[l, target][:, at : at + 1])
                assert experts == mx.argsort(-logits[0, 0])[: m.top_k].tolist()


def test_beginning_at_the_slow_streams_u_is_attending_anew():
    stream = shaken(learn.new_stream(view(), 2.0))
    predictor, batch = StreamPredictor(stream), learn.teacher_batch(view(), ROWS[:2])
    for a, b in ((0, 1), (1, 2), (2, 3)):
        short = predictor.path(batch.states, batch.after, batch.cache, a, b)[-1]
        assert stream.block(a).begins_at_u
        assert mx.allclose(short, stream(batch.states, batch.cache, exit=b)[-1], atol=1e-4)


def test_untrained_it_is_as_good_as_the_next_router_and_training_makes_it_better():
    data, settings = batches(), DistilConfig(steps=60, learning_rate=1e-2, warmup=5)
    stream = learn.new_stream(view(), 2.0, exits=(2, 3), rank=4, ffn_width=16)
    for module in (stream, DirectMap.like(stream)):
        before = learn.recall(learn.predictor_of(module), data)
        bare = DirectMap(view(), DirectConfig(exits=(2, 3), rate=2.0, rank=1))
        if isinstance(module, DirectMap):
            assert before == learn.recall(bare, data)
        frozen = [w for _, w in tree_flatten(view().model.parameters())]
        history = learn.train(module, data, settings)
        after = learn.recall(learn.predictor_of(module), data)
        assert history.losses[-1] < history.losses[0]
        assert np.mean(list(after.values())) > np.mean(list(before.values()))
        now = [w for _, w in tree_flatten(view().model.parameters())]
        assert all(mx.array_equal(a, b) for a, b in zip(frozen, now, strict=True))


def test_a_router_on_its_own_state_is_always_right():
    class Knows(DirectMap):
        def over(self, states, after, cache):
            return {(l, m): after[m] for l in range(tiny.BLOCKS) for m in self.targets(l)}

    found = learn.recall(Knows(view(), DirectConfig((2, 3), 2.0)), batches())
    assert set(found.values()) == {1.0}
    assert learn.by_distance({(0, 1): 0.5, (1, 2): 1.0, (0, 2): 0.25}) == {1: 0.75, 2: 0.25}


def test_trained_predictors_come_back_from_disk_and_know_their_model(tmp_path):
    backbone = view()
    stream = shaken(learn.new_stream(backbone, 2.0, (2, 3)))
    direct = shaken(DirectMap.like(stream))
    checkpoints.save(stream, stream.config, backbone.sha256, trained.folder_of(tmp_path, "m2r2"), "stream")
    folder = trained.folder_of(tmp_path, "direct")
    checkpoints.save(direct, direct.config, backbone.sha256, folder, "direct")
    again = load_stream(backbone, trained.folder_of(tmp_path, "m2r2")), trained.direct(backbone, folder)
    for one, other in zip((stream, direct), again, strict=True):
        for (name, a), (_, b) in zip(tree_flatten(one.parameters()), tree_flatten(other.parameters())):
            assert mx.allclose(a, b, atol=1e-2), name
    with pytest.raises(UserError, match="another model"):
        trained.direct(tiny_experts.resident("olmoe"), folder)


def test_intervals_by_default_look_two_blocks_ahead_and_reach_the_last_block():
    assert learn.default_exits(4) == (1, 2, 3)
    blocks = range(12)
    found = turns(StreamConfig(exits=learn.default_exits(12), rate=2.0), 12, blocks)
    assert found[0].by_u == (1,) and all(turn.by_u == () for l, turn in found.items() if l)
    assert {l: turn.by_p for l, turn in found.items()} == {l: (l + 2,) for l in range(10)}
    longer = turns(StreamConfig(exits=(3, 6), rate=2.0), 12, blocks)
    assert [longer[l].by_p for l in range(6)] == [(2, 3), (4, 5), (6,), (5, 6), (7, 8), (9, 10)]
    assert [l for l in longer if longer[l].by_u] == [0]
    stream = learn.new_stream(view(), 1.0)
    named = {m for l in range(tiny.BLOCKS) for m in StreamPredictor(stream).targets(l)}
    assert named == set(range(1, tiny.BLOCKS)) == {m for _, m in NextRouter(view(), 1).pairs()}


def test_the_command_trains_all_three_and_the_bench_finds_them(tmp_path, monkeypatch, capsys):
    model = tiny.make_folder("olmoe", tmp_path / "model", **tiny_experts.SIZES)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(train_predictor, "text", lambda *_: (ROWS[:4], ROWS[4:]))
    asked = ["train", "predictor", "--model", str(model), "--rows", "4", "--batch", "2", "--steps", "3"]
    asked.append("--record")
    assert main([*asked, "--exits", "2,3"]) == 0
    assert capsys.readouterr().out.count("Saved in") == 3
    lines = [json.loads(line) for line in (tmp_path / "predictors.jsonl").read_text().splitlines()]
    assert [r["settings"]["kind"] for r in lines] == ["m2r2", "m2r2-r1", "direct"]
    assert [r["settings"]["rate"] for r in lines] == [2.0, 1.0, 2.0]
    sizes = [r["figures"]["parameters"] for r in lines]
    assert sizes[0] == sizes[1] and abs(sizes[2] - sizes[0]) < 0.1 * sizes[0]
    pack(model, tmp_path / "store")
    said = []
    found = compare(
        StreamedModel(model, tmp_path / "store"), model, [tiny.prompt(4)], [0.5], Disk("buffered"), 4, 1,
        say=said.append,
    )  # fmt: skip
    assert not said and list(found["budgets"][0]["arms"]) == list(ARMS)
    assert all(arm["equal"] for arm in found["budgets"][0]["arms"].values())


def test_a_dense_model_has_no_experts_to_name(capsys):
    assert main(["train", "predictor", "--model", str(tiny.folder("llama"))]) == 2
    assert "not a mixture of experts" in capsys.readouterr().err
