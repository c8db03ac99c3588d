"""A tokenizer.json is read as it stands, whatever class the folder names: two libraries must
agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.model_folders import keep_digits_together, variant
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from r1zero.data.prompts import detokenize, load_tokenizer, tokenize, vocabulary_of
from r1zero.data.vocabulary import Vocabulary
from r1zero.errors import BadInput

TEXTS = [
    "123+1234",
    "x12y 3,456.78%",
    "  a\t b \n\n\n",
    "<|im_start|>user\nWhat is 12+123?<|im_end|>\n",
    "It's WE'LL",
    "caf\u00e9 cafe\u0301 \u212b \ufb01",
    "\u4f60\u597d\uff0c\u4e16\u754c 12\u4e2a\u3002",
    "a , b . c ?",
    "def f(x):\n    return x**2  # <think>\r\n",
    "\\boxed{\\frac{1}{12}}</answer><|im_end|>",
]
CLASSES = [
    "Qwen2Tokenizer",
    "Qwen2TokenizerFast",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    None,
]


def as_the_file_says(folder: Path) -> tuple[list[list[int]], list[str]]:
    """Ids of the texts, and the texts of these ids, by the library tokenizers alone."""
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    ids = [library.encode(text, add_special_tokens=False).ids for text in TEXTS]
    return ids, [library.decode(each, skip_special_tokens=True) for each in ids]


def assert_as_it_stands(folder: Path) -> PreTrainedTokenizerBase:
    loaded = load_tokenizer(folder)
    ids, texts = as_the_file_says(folder)
    assert tokenize(loaded, TEXTS) == ids
    assert detokenize(loaded, ids, special=False) == texts
    assert [loaded.decode(each, skip_special_tokens=True) for each in ids] == texts
    return loaded


def name_class(name: str | None, **more: Any) -> Any:
    """An edit of tokenizer_config.json."""

    def edit(config: dict[str, Any]) -> None:
        config.pop("tokenizer_class")
        config.update(more | ({} if name is None else {"tokenizer_class": name}))

    return edit


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("name", CLASSES)
def test_digits_stay_together_whatever_class_and_model_are_named(
    tmp_path: Path, tiny: Path, name: str | None, model_type: str
) -> None:
    architecture = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[
        model_type
    ] + "ForCausalLM"
    folder = variant(
        tiny,
        tmp_path / "model",
        tokenizer=keep_digits_together,
        tokenizer_config=name_class(name),
        config=lambda config: config.update(model_type=model_type, architectures=[architecture]),
    )
    loaded = assert_as_it_stands(folder)
    assert loaded.convert_ids_to_tokens(tokenize(loaded, ["123+1234"])[0]) == [
        "123",
        "+",
        "123",
        "4",
    ]
    assert loaded.eos_token == "<|im_end|>" and loaded.eos_token_id == 2


@pytest.mark.parametrize("name", CLASSES)
def test_single_digits_and_letters_of_any_form_stay_as_they_are(
    tmp_path: Path, tiny: Path, name: str | None
) -> None:
    """SmolLM2's steps (digits one by one, GPT-2's rule for words), and no normaliser, where classes
    put NFC."""

    def edit(content: dict[str, Any]) -> None:
        keep_digits_together(content)
        content["normalizer"] = None
        content["pre_tokenizer"]["pretokenizers"] = [
            {"type": "Digits", "individual_digits": True},
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": True,
            },
        ]

    loaded = assert_as_it_stands(
        variant(tiny, tmp_path / "model", tokenizer=edit, tokenizer_config=name_class(name))
    )
    [ids] = tokenize(loaded, ["123"])
    assert len(ids) == 3
    assert loaded.decode(tokenize(loaded, ["cafe\u0301"])[0]) == "cafe\u0301"


@pytest.mark.parametrize(
    "setting",
    [
        {"split_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
        {"add_prefix_space": True},
        {"fix_mistral_regex": True},
        {"add_bos_token": True, "bos_token": "<|im_start|>"},
        {"pad_token": "!"},
    ],
)
def test_settings_beside_the_file_do_not_change_it(
    tmp_path: Path, tiny: Path, setting: dict[str, Any]
) -> None:
    edit = name_class("Qwen2Tokenizer", **setting)
    assert_as_it_stands(variant(tiny, tmp_path / "model", tokenizer_config=edit))


def test_a_file_that_cuts_and_pads_does_neither_to_a_prompt(tmp_path: Path, tiny: Path) -> None:
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    assert_as_it_stands(
        variant(
            tiny, tmp_path / "model", tokenizer=lambda it: it.update(truncation=cut, padding=pad)
        )
    )


def test_tokens_that_only_the_files_beside_it_list_are_added_under_their_ids(
    tmp_path: Path, tiny: Path
) -> None:
    def listed(number: int) -> Any:
        return lambda config: config.update(
            added_tokens_decoder={
                "2": {"content": "<|im_end|>", "special": True},
                str(number): {"content": "<step>", "special": False},
            }
        )

    folder = variant(tiny, tmp_path / "model", tokenizer_config=listed(271))
    assert tokenize(load_tokenizer(folder), ["1<step>2"])[0][1] == 271
    assert Vocabulary.from_folder(folder).unused(320) == (range(272, 320),)
    with pytest.raises(
        BadInput, match="'<step>' with the id 280 is not in tokenizer.json and cannot be added"
    ):
        load_tokenizer(variant(tiny, tmp_path / "other", tokenizer_config=listed(280)))


def test_an_id_that_the_library_would_change_is_refused(tmp_path: Path, tiny: Path) -> None:
    folder = variant(
        tiny,
        tmp_path / "model",
        tokenizer=lambda content: content["added_tokens"][-1].update(id=290),
    )
    with pytest.raises(
        BadInput, match="gives the token ': ' the id 290, but the library tokenizers gives it 270"
    ):
        load_tokenizer(folder)


def test_a_folder_without_the_file_is_read_by_its_class(tmp_path: Path, tiny: Path) -> None:
    whole = json.loads((tiny / "model" / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    shutil.copyfile(tiny / "model" / "config.json", tmp_path / "config.json")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}'
    )
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(tokenize(loaded, ["What is 12?"])[0]) == "What is 12?"
    assert vocabulary_of(loaded).single("<|im_end|>") == vocabulary_of(loaded).end_of_text == 2
    assert Vocabulary.from_folder(tmp_path) is None
