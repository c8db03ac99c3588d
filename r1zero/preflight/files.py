"""The files a run reads, looked at before it starts: model folders, weights, tokenizer, data and
template.

Of weights only headers are read, so even a large model takes a moment; data is read whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from r1zero.config.keys import EMBEDDED_NAMES
from r1zero.config.parse import LARGEST, read_json
from r1zero.config.paths import expand
from r1zero.config.schema import Config, filled
from r1zero.data.blend import split_blend
from r1zero.data.ends import FILES, file_ends, find_ends, refuse_split_ends, stop_ends
from r1zero.data.preprocessed import is_preprocessed
from r1zero.data.sources import EVAL_DATA, EVAL_SETS, TRAIN_DATA, DataSource
from r1zero.data.template import Template
from r1zero.data.vocabulary import TOKENIZER, Vocabulary
from r1zero.errors import BadInput, nearest, readable
from r1zero.models.config import ModelConfig
from r1zero.preflight.datasets import check_data, compares, data_sets, keeping, templates_of
from r1zero.preflight.found import Found, ModelFound
from r1zero.weights.detect import CONFIG, check_files, detect
from r1zero.weights.headers import StoredTensor, read_header, refuse_others, weight_files

FOLDERS = (
    "actor_rollout.load",
    "ref.load",
    "reward.load",
    "training.tokenizer_name_or_path",
    "reward.tokenizer_name_or_path",
)


@dataclass(frozen=True, slots=True)
class EndKeys:
    """What the user sets the tokens with that end a response."""

    load: str
    stop: str


END_KEYS = EndKeys("actor_rollout.load", "actor_rollout.stop")


def absent(cfg: Config) -> dict[str, str]:
    """The key of each path, of model folders and data, that is not on this machine."""
    named = [
        ("actor_rollout.load", cfg.actor_rollout.load),
        ("ref.load", cfg.ref.load if cfg.has_reference else None),
        ("training.tokenizer_name_or_path", cfg.training.tokenizer_name_or_path),
        ("reward.load", cfg.reward.load if cfg.has_reward_model else None),
        (
            "reward.tokenizer_name_or_path",
            cfg.reward.tokenizer_name_or_path if cfg.has_reward_model else None,
        ),
        *((source.key, source.path) for source in data_sets(cfg)[0]),
    ]
    return _absent([(key, path) for key, path in named if path is not None])


def _absent(named: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The first key of each path that is not here, of (key, path)."""
    return {
        path: key
        for key, path in reversed(named)
        if not Path(path).exists() and not is_preprocessed(path)
    }


def missing_beside_wrong_keys(sound: Config) -> list[str]:
    """Return a sentence for every missing file of a configuration without its wrong keys, so that
    both are told at once."""
    problems = []
    named = []
    values = []
    for key in (*FOLDERS, TRAIN_DATA, EVAL_DATA, EVAL_SETS):
        value = _sound_value(sound, key)
        if key.startswith("reward.") and not _sound_value(sound, "has_reward_model"):
            continue
        if isinstance(value, dict):
            values += [(f"{key}.{name}.path", entry.path) for name, entry in value.items()]
        else:
            values.append((key, value))
    for key, text in values:
        if text is None:
            continue
        try:
            named += [(key, path) for path in _paths(key, expand(text))]
        except BadInput as error:
            problems.append(f"{key}: {error}")
    try:
        with readable():
            problems += _missing_sentences(_absent(named))
    except BadInput as error:
        problems.append(str(error))
    return problems


def _sound_value(sound: Config, key: str) -> Any:
    """The value of a key; None, too, where it was wrong, which is told already."""
    try:
        return attrgetter(key)(sound)
    except AttributeError:
        return None


def _paths(key: str, text: str) -> list[str]:
    """The paths of a key: each of a blend of data, else the one."""
    if key in FOLDERS:
        return [text]
    return [path for _, path in split_blend(text)]


def check_inputs(found: Found, absent_ok: bool = False) -> list[str]:
    """Return a sentence for every file that is missing (unless `absent_ok`), damaged or of a wrong
    kind."""
    cfg = found.config
    missing = absent(cfg)
    named, problems = data_sets(cfg, keeping(cfg))
    if not absent_ok:
        problems += _missing_sentences(missing)
    no_models = set()
    for model in _models(found):
        if model.load in missing:
            continue
        sentences = _check_model(f"{model.role}.load", model)
        problems += sentences
        if sentences and not (model.folder / CONFIG).is_file():
            no_models.add(model.load)  # of which enough was said
    templates, wrong = templates_of(named, filled(cfg.training.prompt_type_path))
    of_tokens = _check_tokens(found, missing.keys() | no_models) + wrong
    tokens_are_here = not {cfg.training.tokenizer_name_or_path, found.actor.load} & missing.keys()
    if templates and not of_tokens and found.actor.shape is not None and tokens_are_here:
        of_tokens += _check_all_ends(found, named, templates)
    for source in named:
        if source.path not in missing:
            compared = compares(list(source.scorers))
            template = templates.get(source.prompt_type)
            rows = _vocabulary_rows(found)
            problems += check_data(source.key, source.path, source.layout, template, compared, rows)
    return problems + of_tokens


def _check_all_ends(
    found: Found, sources: Sequence[DataSource], templates: Mapping[str, Template]
) -> list[str]:
    """What ends a response, by the templates of all data sets together."""
    cfg = found.config
    tokenizer = Path(cfg.training.tokenizer_name_or_path or "")
    rendering = {}
    for source in reversed(sources):
        if source.prompt_type in templates and not is_preprocessed(source.path):
            rendering[source.prompt_type] = source.prompt_type_key
    keys = {key: templates[name] for name, key in rendering.items()}
    stop = cfg.actor_rollout.stop
    return check_ends(found.actor.folder, tokenizer, templates.values(), stop, keys, END_KEYS)


def _models(found: Found) -> list[ModelFound]:
    """The models that are to be looked at, each once."""
    models = [found.actor]
    if found.reference is not None and found.reference.load != found.actor.load:
        models.append(found.reference)
    if found.reward_model is not None and found.reward_model.load:  # else that is told
        models.append(found.reward_model)
    return models


def _vocabulary_rows(found: Found) -> int:
    """Rows of the embedding, beyond which no id may lie."""
    if found.actor.shape is None:
        return LARGEST
    return found.actor.shape.vocab_size


def _check_tokens(found: Found, unknown: Set[str]) -> list[str]:
    """The tokenizer and what ends a response, unless their folders are among the `unknown`."""
    tokenizer = found.config.training.tokenizer_name_or_path or ""
    rows = _vocabulary_rows(found)
    problems = []
    if tokenizer not in unknown:
        problems += check_tokenizer("training.tokenizer_name_or_path", Path(tokenizer), rows)
    if found.actor.shape is not None and found.actor.load not in unknown:
        problems += check_end_of_text("actor_rollout.load", found.actor.folder, rows)
    return problems


def _missing_sentences(missing: dict[str, str]) -> list[str]:
    """One sentence a path; a folder that several keys name is missed once."""
    problems = []
    for path, key in missing.items():
        if Path(path).is_symlink():
            target = os.readlink(path)
            problems.append(f"{key}: {path} is a link to {target}, which does not exist")
            continue
        if "data" in key:
            kind = "file of prompts, or the prefix of preprocessed ones"
        else:
            kind = "Hugging Face model folder"
        kind += " or a Megatron checkpoint" * key.endswith(".load")
        folder = Path(path).parent
        if folder.parent.name == ".cache" and folder.name in EMBEDDED_NAMES:
            way_out = f"; make it with `python tools/make_tiny.py {folder.name}`"
        else:
            beside = Path(path).parent
            if beside.is_dir():
                names = [entry.name for entry in beside.iterdir()]
            else:
                names = []
            way_out = (
                nearest(Path(path).name, names) or "; relative paths start at the current directory"
            )
        problems.append(f"{key}: {path} does not exist: it must be a {kind}{way_out}")
    return problems[::-1]


def check_weights(key: str, path: Path, folder: Path) -> list[str]:
    """A Hugging Face folder of whole safetensors files that hold the tensors of its model, or a
    Megatron checkpoint; `folder` has config.json."""
    try:
        return _check_files(key, path, folder, ModelConfig.from_folder(folder), None)
    except BadInput as error:
        return _check_files(key, path, folder, None, str(error))


def _check_model(key: str, model: ModelFound) -> list[str]:
    """The same of a model whose config.json was read already."""
    return _check_files(key, Path(model.load), model.folder, model.shape, model.problem)


def _check_files(
    key: str, path: Path, folder: Path, shape: ModelConfig | None, problem: str | None
) -> list[str]:
    """The files at `path`; `problem` is why config.json in `folder` describes no network."""
    try:
        found = detect(path)
        tokenizer = "training.tokenizer_name_or_path"
        if key == "reward.load":
            tokenizer = "reward.tokenizer_name_or_path"
        if found.kind != "hf" and not (folder / CONFIG).is_file():
            return [
                f"{key}: {path} is a Megatron checkpoint, and no {CONFIG} tells the model's "
                f"shape; put the model's beside it, or set {tokenizer} to a folder that has one"
            ]
        if problem is not None:
            return [f"{key}: {problem}"]
        if found.kind != "hf":
            return [f"{key}: {problem}" for problem in check_files(found)]
        return _check_tensors(key, path, shape)
    except BadInput as error:
        return [f"{key}: {error}"]


def _check_tensors(key: str, folder: Path, shape: ModelConfig | None) -> list[str]:
    """The safetensors files of a folder: whole, and with the tensors of the network. BadInput."""
    stored: dict[str, StoredTensor] = {}
    problems = []
    for shard in weight_files(folder):
        try:
            stored |= read_header(shard)
        except BadInput as error:
            problems.append(f"{key}: {error}")
    if shape is not None and not problems:
        refuse_others(folder, stored, shape)
    return problems


def check_template(key: str, name: str, path: str) -> list[str]:
    """A known prompt template."""
    try:
        Template(name, path)
    except BadInput as error:
        return [f"{key}: {error}"]
    return []


def check_tokenizer(key: str, folder: Path, vocab_size: int) -> list[str]:
    """A folder with the whole files of a tokenizer, none of whose ids lies beyond the model's
    embedding."""
    known = (
        (TOKENIZER,),
        ("tokenizer_config.json", "vocab.json", "merges.txt"),
        ("tokenizer_config.json", "tokenizer.model"),
    )
    if not any(all((folder / name).is_file() for name in names) for names in known):
        return [
            (
                f"{key}: {folder} has no tokenizer.json: give a folder that holds a Hugging Face "
                "tokenizer"
            )
        ]
    contents = {}
    for path in sorted(folder.glob("*token*.json")):
        try:
            contents[path.name] = read_json(path)
        except BadInput as error:
            return [f"{key}: {error}; copy it again"]
        if not isinstance(contents[path.name], dict):
            return [f"{key}: {path} must hold a JSON object; copy it again"]
    try:
        vocabulary = Vocabulary.from_folder(folder)
        if vocabulary is not None:
            vocabulary.refuse_beyond(vocab_size)
    except BadInput as error:
        return [f"{key}: {error}"]
    return []


def check_end_of_text(key: str, folder: Path, vocab_size: int) -> list[str]:
    """What ends a response, where the model folder says it, must be ids of the vocabulary."""
    for path in (folder / name for name in FILES):
        try:
            found = file_ends(path)
        except BadInput as error:
            return [f"{key}: {error}"]
        if not all(0 <= number < vocab_size for number in found):
            return [
                f"{key}: {path}: eos_token_id: {found} must be ids below {vocab_size}, the rows "
                "of the embedding"
            ]
    return []


def check_ends(
    folder: Path,
    tokenizer: Path,
    templates: Iterable[Template],
    stop: Sequence[str],
    rendering: Mapping[str, Template],
    keys: EndKeys,
) -> list[str]:
    """The model in `folder`, tokenizer, configuration and templates must agree on tokens that end a
    response; `rendering` are those that render raw data, by the keys that name them.

    Without a tokenizer.json only its own library knows the tokens: then the run looks when it
    starts.
    """
    vocabulary = Vocabulary.from_folder(tokenizer)
    if vocabulary is None:
        return []
    key = keys.stop
    try:
        for named_by, template in rendering.items():
            key = named_by
            refuse_split_ends(template, vocabulary)
        key = keys.stop
        stop_ends(stop, vocabulary)
        key = keys.load
        find_ends(folder, vocabulary, templates, stop)
    except BadInput as error:
        return [f"{key}: {error}"]
    return []
