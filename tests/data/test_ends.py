"""What ends a response: model, tokenizer, template and configuration name it, and must agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.model_folders import base, llama_like, variant
from support.prompt_streams import prompts_of
from support.small_config import load, only
from support.tool import functions
from support.worlds import SHORT, metrics, run, samples

from r1zero.data.ends import find_ends, split_marks
from r1zero.data.preprocess import Recipe, preprocess
from r1zero.data.problems import Problem
from r1zero.data.prompts import load_tokenizer
from r1zero.data.template import TEMPLATES, Template
from r1zero.data.vocabulary import Vocabulary
from r1zero.errors import BadInput
from r1zero.preflight.checks import check

LLAMA_3 = {
    "text": ["<|start_header_id|>user\n{question}<|eot_id|>", "<|start_header_id|>assistant\n"]
}


def templates(folder: Path, **entries: dict) -> Path:
    path = folder / "templates.json"
    path.write_text(json.dumps(entries))
    return path


def ends(folder: Path, template: Template, *stop: str) -> dict[int, list[str]]:
    vocabulary = Vocabulary.from_folder(folder)
    assert vocabulary is not None
    return find_ends(folder, vocabulary, [template], stop).sources


# -- who names them -------------------------------------------------------------------------------


def test_all_that_name_an_end_count(home: Path) -> None:
    folder, plain = home / "net", Template("plain")
    (folder / "generation_config.json").write_text('{"eos_token_id": [12, 5]}')
    (folder / "config.json").write_text('{"eos_token_id": [5, 7]}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    model = {
        5: ["config.json", "generation_config.json"],
        7: ["config.json"],
        12: ["generation_config.json"],
        95: ["tokenizer"],
    }
    assert ends(folder, plain) == model
    assert ends(folder, Template("qwen_r1")) == model | {97: ["template qwen_r1"]}
    assert ends(folder, plain, "<|im_end|>", "7", "!") == model | {
        1: ["stop"],
        7: ["config.json", "stop"],
        97: ["stop"],
    }


def test_one_line_says_them_all(home: Path) -> None:
    (home / "net" / "config.json").write_text('{"eos_token_id": 95}')
    vocabulary = Vocabulary.from_folder(home / "net")
    assert str(find_ends(home / "net", vocabulary, [Template("qwen_r1")], ["\\"])) == (
        "'\\\\' (60; stop) or '<|endoftext|>' (95; config.json) or '<|im_end|>' (97; template "
        "qwen_r1)"
    )


def test_an_id_of_no_token_ends_nothing(home: Path) -> None:
    """It is never drawn; alone it would leave responses without an end."""
    (home / "net" / "config.json").write_text('{"eos_token_id": [95, 120]}')
    assert list(ends(home / "net", Template("plain"))) == [95]
    (home / "net" / "config.json").write_text('{"eos_token_id": 120}')
    with pytest.raises(BadInput, match="no token ends a response"):
        ends(home / "net", Template("plain"))


@pytest.mark.parametrize(
    ("behind", "mark"),
    [
        ("<|im_end|>\n<|im_start|>assistant\n", ["<|im_end|>"]),
        ("\nThink.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", ["<|eot_id|>"]),
        ("</s>\n<|assistant|>\n", ["</s>"]),
        ("<end_of_turn>\n<start_of_turn>model\n", ["<end_of_turn>"]),
        ("<\uff5cAssistant\uff5c>", []),  # a single mark opens the answer
        ("\n<think> and </think>\nAssistant: <think>", []),
        ("", []),
    ],
)
def test_the_mark_that_closes_the_question_s_turn_is_found(
    tmp_path: Path, behind: str, mark: list[str]
) -> None:
    path = templates(
        tmp_path,
        mine={"text": ["<|im_start|>", "{question}", behind]},
        said={"text": ["{question}", behind], "stop": ["</answer>"]},
        none={"text": ["{question}", behind], "stop": []},
    )
    assert Template("mine", path).stop == mark
    assert Template("said", path).stop == ["</answer>"] and Template("none", path).stop == []


@pytest.mark.parametrize("stop", ["<|im_end|>", [3], None])
def test_a_malformed_stop_of_a_template_is_refused(tmp_path: Path, stop: object) -> None:
    with pytest.raises(BadInput, match='"stop", a list of strings'):
        Template("mine", templates(tmp_path, mine={"text": ["{question}"], "stop": stop}))


# -- what is refused before a run -----------------------------------------------------------------


def test_no_end_at_all_is_refused_until_one_is_named(home: Path) -> None:
    problem = only(check(load(home, "training.prompt_type=plain")))
    assert problem.startswith(f"actor_rollout.load: {home}/net: no token ends a response")
    assert "actor_rollout.stop" in problem
    assert check(load(home, "training.prompt_type=plain", "actor_rollout.stop=[97]")) == []
    assert (
        check(load(home, "training.prompt_type=plain", 'actor_rollout.stop=["<|im_end|>"]')) == []
    )
    assert check(load(home, "training.prompt_type=qwen_r1")) == []


@pytest.mark.parametrize(
    ("stop", "sentence"),
    [
        (
            '["</answer>"]',
            "'</answer>' is not one token of this tokenizer but ['<', '/', 'a', 'n', ",
        ),
        ("[98]", "98 is no id of this tokenizer, whose ids go up to 97"),
        ('["\u4e2d"]', "is not one token of this tokenizer"),
    ],
)
def test_a_stop_that_is_no_token_is_refused(home: Path, stop: str, sentence: str) -> None:
    problem = only(check(load(home, f"actor_rollout.stop={stop}")))
    assert problem.startswith("actor_rollout.stop: ") and sentence in problem


def test_a_template_with_marks_of_another_family_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = llama_like(tiny, tmp_path / "llama")
    tokenizer = load_tokenizer(folder)
    config = functions("../r1zero/preflight/resolve.py")["load_config"]

    def problems(*overrides: str) -> list[str]:
        return check(
            config(
                "tiny", [f"actor_rollout.load={folder}", f"output_dir={tmp_path}/run", *overrides]
            )[0]
        )

    problem = only(problems())
    assert problem.startswith(
        "training.prompt_type: template 'qwen_r1' closes a turn with <|im_end|>, which is no"
    )
    assert "r1_zero_paper" in problem and "<|start_header_id|>, <|eot_id|>" in problem
    assert problems("training.prompt_type=r1_zero_paper") == []
    chat = json.loads(TEMPLATES.read_text())["qwen_r1"]
    path = templates(
        tmp_path,
        llama=LLAMA_3,
        as_text=chat | {"stop": []},
        own_stop=chat | {"stop": ["<|eot_id|>"]},
    )
    for name, marks in (
        ("llama", []),
        ("as_text", ["<|im_start|>", "<|im_end|>"]),
        ("own_stop", ["<|im_start|>", "<|im_end|>"]),
    ):
        assert problems(f"training.prompt_type={name}", f"training.prompt_type_path={path}") == []
        assert split_marks(Template(name, path), Vocabulary.from_folder(folder)) == marks
    assert ends(folder, Template("llama", path))[2][-1] == "template llama"
    # Whatever renders prompts refuses it, too, and what was rendered elsewhere is left alone.
    with pytest.raises(BadInput, match="closes a turn"):
        prompts_of(
            tiny / "train.parquet",
            {"prompt": "question", "response": "ground_truth_answer"},
            Template("qwen_r1"),
            tokenizer,
            99,
            seed=1,
        )
    handler = "R1AlpacaStyleInstructionHandler"
    with pytest.raises(BadInput, match="closes a turn"):
        preprocess(
            [Problem("1+1?", "2", "")],
            str(tmp_path / "no"),
            Recipe(str(folder), "qwen_r1", str(TEMPLATES), handler),
            1,
        )
    preprocess(
        [Problem("1+1?", "2", "")],
        str(tmp_path / "packed"),
        Recipe(str(folder), "llama", str(path), handler),
        1,
    )
    assert (
        problems(f"actor_rollout.data_path={tmp_path}/packed", "training.eval_data_path=null") == []
    )


def test_an_answer_cannot_end_with_what_the_tokenizer_does_not_have(
    home: Path, tmp_path: Path
) -> None:
    recipe = Recipe(str(home / "net"), "plain", str(TEMPLATES), "AlpacaStyleInstructionHandler")
    with pytest.raises(
        BadInput, match="names no end of text, which AlpacaStyleInstructionHandler puts behind"
    ):
        preprocess([Problem("1+1?", "2", "")], str(tmp_path / "no"), recipe, workers=1)


# -- whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def usual(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("usual"), 1, "tiny", SHORT)


def test_a_base_model_ends_its_turn_where_the_chat_template_does(
    tiny: Path, usual: Path, tmp_path: Path
) -> None:
    """Its files name <|endoftext|> only; its samples are those of the model whose files name
    <|im_end|>, too."""
    found = run(
        tmp_path / "run", 1, "tiny", [*SHORT, f"actor_rollout.load={base(tiny, tmp_path / 'base')}"]
    )
    for step in (1, 2):
        assert [row["response"] for row in samples(found, step)] == [
            row["response"] for row in samples(usual, step)
        ]
        assert (
            metrics(found)[step - 1]["response_truncated"]
            == metrics(usual)[step - 1]["response_truncated"]
            < 0.5
        )
    log = (found / "logs" / "rank_0000.log").read_text()
    assert (
        "a response ends with '<|endoftext|>' (0; config.json, generation_config.json, tokenizer) "
        "or '<|im_end|>' (2; template qwen_r1)"
    ) in log
    exported = json.loads((found / "model" / "generation_config.json").read_text())
    assert exported["eos_token_id"] == [0, 2] and exported["pad_token_id"] == 0


def test_a_stop_of_the_configuration_ends_responses_and_goes_along(
    tiny: Path, usual: Path, tmp_path: Path
) -> None:
    folder = variant(tiny, tmp_path / "model")
    (folder / "generation_config.json").unlink()
    found = run(
        tmp_path / "run",
        1,
        "tiny",
        [*SHORT, f"actor_rollout.load={folder}", 'actor_rollout.stop=["</think>", 269]'],
    )
    pairs = list(zip(samples(found, 1), samples(usual, 1), strict=True))
    cut = [
        (row["response"], other["response"])
        for row, other in pairs
        if row["response"] != other["response"]
    ]
    assert cut and all(
        other.startswith(response) and response.endswith(("</think>", ", "))
        for response, other in cut
    )
    assert not any(", " in row["response"][:-2] for row, _ in pairs)
    assert not any(row["truncated"] for row, _ in pairs)
    exported = json.loads((found / "model" / "generation_config.json").read_text())
    assert exported == {"eos_token_id": [2, 264, 269]}
    again = Vocabulary.from_folder(found / "model")
    assert list(find_ends(found / "model", again, [Template("plain")], []).ids) == [2, 264, 269]
