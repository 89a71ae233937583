"""What a run asks: later turns after plain decoding's own answer, and what is left out."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny

from m2r2kit import __main__ as cli
from m2r2kit.bench import speculation as bench
from m2r2kit.bench.questions import questions
from m2r2kit.common import UserError
from m2r2kit.model.backbone import Backbone
from m2r2kit.speculation import M2R2, Plain, generate
from m2r2kit.speculation.drafters.lookahead import Lookahead
from m2r2kit.speculation.drafters.m2r2_tree import M2R2Tree
from m2r2kit.speculation.drafters.prompt_lookup import PromptLookup
from m2r2kit.stream.stream import AcceleratedStream, StreamConfig
from m2r2kit.text import prompts
from m2r2kit.text.prompts import Prompt

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "data" / "pocket-dense"
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'U:', 'assistant': 'A:'}[m.role] + m.content }};{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
CONTEXT = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a chat template."""
    made = tiny.make_folder("llama", tmp_path_factory.mktemp("chat"), max_position_embeddings=CONTEXT)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return made


@pytest.fixture(scope="module")
def view(folder):
    return Backbone.load(folder)


def test_a_chat_template_that_fails_is_no_prompt_that_is_too_long(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "model")
    settings = json.loads((broken / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ raise_exception('no') }}"
    (broken / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="chat template fails"):
        questions(Backbone.load(broken), [Prompt("a", "One?")], 5)


# --- turns --------------------------------------------------------------------------------


def test_each_turn_follows_plain_decodings_answers(view):
    asked = questions(view, [Prompt("a", " One? ", "x", ("Two?", "3?")), Prompt("b", "Else?")], 5)
    assert [(p.id, p.prompt, p.kind) for p in asked.prompts] == [
        ("a", " One? ", "x"),
        ("a.2", "Two?", "x"),
        ("a.3", "3?", "x"),
        ("b", "Else?", ""),
    ]
    first, second = (view.decode(generate(view, ids, max_tokens=5).tokens) for ids in asked.ids[:2])
    assert [view.decode(ids) for ids in asked.ids] == [
        "U:One?;A:",
        f"U:One?;A:{first};U:Two?;A:",
        f"U:One?;A:{first};U:Two?;A:{second};U:3?;A:",
        "U:Else?;A:",
    ]
    assert first and second and asked.left_out == ""


def test_a_turn_without_room_is_left_out_with_those_after_it(view):
    long = "x" * CONTEXT
    fits = Prompt("d", "x" * (CONTEXT - len("U:;A:") - 1))  # one token less than the context
    asked = questions(
        view, [Prompt("a", long, "", ("b",)), Prompt("b", "b", "", (long, "c")), Prompt("c", "c"), fits], 5
    )
    assert [p.id for p in asked.prompts] == ["b", "c", "d"] and len(asked.ids[-1]) == CONTEXT - 1
    assert asked.left_out == (
        f"Left out of 7 prompts: 4 that exceed the model's context of {CONTEXT} tokens."
    )
    with pytest.raises(UserError, match=f"No prompt fits in the model's context of {CONTEXT} tokens"):
        questions(view, [Prompt("a", long)], 5)


def test_later_turns_need_a_chat_template():
    asked = questions(tiny.backbone(), [Prompt("a", "a", "", ("b", "c")), Prompt("b", "b" * 99)], 5)
    assert [p.id for p in asked.prompts] == ["a"]
    assert asked.left_out == (
        f"Left out of 4 prompts: 1 that exceed the model's context of {tiny.CONTEXT} tokens; "
        "2 that follow an answer, as the tokenizer has no chat template."
    )
    with pytest.raises(UserError, match="needs a chat template"):
        tiny.backbone().encode("b", before=["a", "an answer"])


# --- the command --------------------------------------------------------------------------


def bench_speculation(folder, file, *more):
    arguments = ["--model", str(folder), "--prompts", str(file), "--max-tokens", "6", "--repeats", "1"]
    methods = ["--methods", "plain,mlx_lm,prompt-lookup,lookahead"]
    return cli.main(["bench", "speculation", *arguments, *methods, *more])


def test_bench_takes_mt_bench_as_it_is(folder, tmp_path, capsys):
    file, out = tmp_path / "mt_bench.jsonl", tmp_path / "out.json"
    kinds = ("math", "writing", "math", "math")
    turns = [["One?", "Two?"], ["1?", "2?"], ["Three?", "x" * CONTEXT], ["Not asked?", "No."]]
    lines = [
        {"question_id": 81 + i, "category": kind, "turns": t}
        for i, (kind, t) in enumerate(zip(kinds, turns, strict=True))
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert bench_speculation(folder, file, "--limit", "2", "--json", str(out)) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert printed.startswith("Left out of 6 prompts: 1 that exceed the model's context of 100 tok")
    assert (found["settings"]["prompts"], found["settings"]["left_out"]) == (5, 1)
    assert found["per_kind"].keys() == {"math", "writing"}
    assert all(arm["equal"] and arm["tokens"] for arm in found["arms"].values())


def test_bench_refuses_a_file_of_which_nothing_fits(folder, tmp_path, capsys):
    file = tmp_path / "koala.jsonl"
    file.write_text(json.dumps({"id": "koala_0", "prompt": "x" * CONTEXT}))
    assert bench_speculation(folder, file) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "No prompt fits" in err


# --- the published files ------------------------------------------------------------------


def published() -> Path | None:
    """The folder `shared/eval` beside the project, or beside the repository that this is a worktree of."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--path-format=absolute", "--git-common-dir"]
    found = subprocess.run(git, capture_output=True, text=True)
    projects = [ROOT, *([Path(found.stdout.strip()).parent] if found.returncode == 0 else [])]
    folders = [project.parent / "shared" / "eval" for project in projects]
    return next((folder for folder in folders if folder.is_dir()), None)


@pytest.mark.parametrize(
    ("name", "count", "kinds"), [("mt_bench", 80, 8), ("koala", 180, 1), ("self_instruct", 252, 1)]
)
def test_published_files_through_the_pocket_model(name, count, kinds):
    if (shared := published()) is None:
        pytest.skip("the published prompt sets are not beside the project, and a test downloads nothing")
    found = prompts.read(shared / f"{name}.jsonl")
    assert len(found) == count and len({p.kind for p in found}) == kinds
    assert all(len(p.more_turns) == (name == "mt_bench") for p in found)
    assert found[0].kind == ("writing" if name == "mt_bench" else name)
    view = Backbone.load(POCKET)
    asked = questions(view, prompts.first_of_each_kind(found, 3)[:3], 8)
    stream = AcceleratedStream(view, StreamConfig(exits=(3,)))  # untrained, which changes no text
    arms = [
        bench.Arm("m2r2", M2R2(view, stream), 4),
        bench.Arm("m2r2-tree", M2R2Tree(view, stream), 4),
        bench.Arm("prompt-lookup", PromptLookup(view), 4),
        bench.Arm("lookahead", Lookahead(view), 4),
        bench.Arm("plain", Plain()),
    ]
    bench.run_arms(view, arms, asked.ids, 8)
    assert len(asked.ids) + asked.too_long == (6 if name == "mt_bench" else 3)
    assert all(arm.equal and arm.tokens for arm in arms)
