"""What a reward model must be for a run, looked at before anything starts. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from r1zero.config.schema import Config, filled
from r1zero.data.preprocessed import is_preprocessed
from r1zero.data.sources import DataSource, train_sources
from r1zero.data.template import Template
from r1zero.data.vocabulary import Vocabulary
from r1zero.errors import BadInput, neighbours
from r1zero.models.config import ModelConfig
from r1zero.models.family import family_of
from r1zero.preflight.files import check_tokenizer
from r1zero.preflight.found import Found, ModelFound
from r1zero.reward_model.tokenizer import OF_TOKENIZER, chat_template, tokenizer_folder


def check_reward_model(found: Found) -> list[str]:
    """Return a sentence for everything that is wrong with the reward model, as far as it is on this
    machine; keys by themselves are right, and its files are looked at elsewhere."""
    model = found.reward_model
    cfg = found.config
    if model is None or not model.load:
        return []
    problems = []
    if cfg.reward.model is not None and cfg.reward.model not in cfg.model:
        problems.append(
            f"reward.model: {cfg.reward.model} is not listed under defaults: add `- model: "
            f"[{cfg.reward.model}]`, or leave it out"
        )
    problems += _check_categories(cfg)
    if model.shape is not None:
        problems += _check_grid(cfg, model.shape)
        problems += _check_scale(cfg, model, model.shape)
        problems += _check_rendering(found, model, model.shape)
    return problems


def reward_model_cautions(found: Found) -> list[str]:
    """What deserves a second look: a reward model that cannot read the longest responses."""
    model = found.reward_model
    cfg = found.config
    if model is None or model.shape is None or model.shape.max_positions >= cfg.training.seq_length:
        return []
    return [
        f"reward.load: {model.load} reads at most {model.shape.max_positions} tokens, and prompt and "
        f"response have up to {cfg.training.seq_length} (training.seq_length): what is longer gets what "
        "the worst of its group gets, and counts as failed (reward.max_failure_rate)"
    ]


def _check_categories(cfg: Config) -> list[str]:
    """One category for each data set of a blend, or one for all."""
    try:
        for source in train_sources(cfg):
            source.parts()
    except BadInput as error:
        return [str(error)]
    return []


def _check_grid(cfg: Config, shape: ModelConfig) -> list[str]:
    """TP divides what it cuts, and PP the layers."""
    problems = []
    cuts = {
        "tensor_model_parallel_size": family_of(shape).cut_sizes(shape),
        "pipeline_model_parallel_size": {"num_layers": shape.num_layers},
    }
    for key, sizes in cuts.items():
        value = getattr(cfg.reward, key)
        uneven = [f"{name} {size}" for name, size in sizes.items() if size % value]
        if uneven:
            works = [n for n in range(1, value) if not any(size % n for size in sizes.values())]
            problems.append(
                f"reward.{key}: {value} does not divide {', '.join(uneven)} of the reward model; "
                f"{neighbours(value, works)}"
            )
    return problems


def _check_scale(cfg: Config, model: ModelFound, shape: ModelConfig) -> list[str]:
    """`fixed` needs a mean and a deviation."""
    head = shape.value_head
    if cfg.reward.normalize != "fixed" or head is None:
        return []
    return [
        f"reward.{key}: null is no {key} for normalize: fixed, and config.json of {model.folder} has "
        "none; give it, or set normalize to group"
        for key in ("mean", "std")
        if getattr(cfg.reward, key) is None and getattr(head, key) is None
    ]


def _check_rendering(found: Found, model: ModelFound, shape: ModelConfig) -> list[str]:
    """What the model reads can be made of what was sampled."""
    cfg = found.config
    is_process = shape.value_head is not None and shape.value_head.step_token is not None
    has_tokenizer = cfg.reward.tokenizer_name_or_path is not None
    if cfg.reward.prompt_type is None and not is_process and not has_tokenizer:
        return _check_same_tokens(cfg, model, shape)
    problems = _check_tokenizer(cfg, model, shape)
    if is_process and not problems:
        problems += _check_mark(cfg, model, shape)
    if cfg.reward.prompt_type is None and not is_process and not problems:
        problems += _check_same_tokens(cfg, model, shape)
    if cfg.reward.prompt_type is not None and not problems:
        problems += _check_template(cfg, model) + _check_questions(train_sources(cfg))
    return problems


def _check_tokenizer(cfg: Config, model: ModelFound, shape: ModelConfig) -> list[str]:
    """What encodes the text, where it is on this machine."""
    key = "reward.load"
    if cfg.reward.tokenizer_name_or_path is not None:
        key = "reward.tokenizer_name_or_path"
    folder = tokenizer_folder(cfg, model.folder)
    if not folder.is_dir():
        return []  # told by the checks of files
    return check_tokenizer(key, folder, shape.vocab_size)


def _check_mark(cfg: Config, model: ModelFound, shape: ModelConfig) -> list[str]:
    """The mark of a step is one token of the tokenizer that reads it."""
    folder = tokenizer_folder(cfg, model.folder)
    vocabulary = Vocabulary.from_folder(folder)
    assert shape.value_head is not None, "a process reward model has a head"
    number = shape.value_head.step_token
    if vocabulary is None or number is None:
        return []
    text = vocabulary.backend.id_to_token(number)
    if text is not None and vocabulary.backend.encode(text, add_special_tokens=False).ids == [
        number
    ]:
        return []
    return [
        f"reward.load: {model.load} ends a step with the token {number}, and the tokenizer in {folder} "
        "has no such mark; give the reward model's own in reward.tokenizer_name_or_path"
    ]


def _check_template(cfg: Config, model: ModelFound) -> list[str]:
    name = filled(cfg.reward.prompt_type)
    folder = tokenizer_folder(cfg, model.folder)
    if name != OF_TOKENIZER:
        try:
            Template(name, filled(cfg.training.prompt_type_path))
        except BadInput as error:
            return [f"reward.prompt_type: {error}"]
        return []
    try:
        if not folder.is_dir() or chat_template(folder) is not None:
            return []
    except BadInput as error:
        return [f"reward.prompt_type: {error}"]
    return [
        f"reward.prompt_type: {name} asks for the chat template of the tokenizer, and {folder} has none "
        "called default; name a template of the templates file"
    ]


def _check_questions(sources: list[DataSource]) -> list[str]:
    """A template needs the question, which what is preprocessed has no more."""
    problems = []
    for source in sources:
        try:
            paths = [part.path for part in source.parts()]
        except BadInput:
            continue  # told by the checks of the data
        problems += [
            f"{source.key}: {path} is preprocessed, so the question that reward.prompt_type would render "
            "is not in it; name the data that it was made of, or leave prompt_type out"
            for path in paths
            if is_preprocessed(path)
        ]
    return problems


def _check_same_tokens(cfg: Config, model: ModelFound, shape: ModelConfig) -> list[str]:
    """What the policy sampled are tokens of the reward model, too."""
    way_out = f"set reward.prompt_type, such as {OF_TOKENIZER}, and it reads the text"
    try:
        own = Vocabulary.from_folder(Path(filled(cfg.training.tokenizer_name_or_path)))
        others = Vocabulary.from_folder(tokenizer_folder(cfg, model.folder))
    except BadInput:
        return []  # told by the checks of tokenizers
    if own is None:
        return []
    if own.size > shape.vocab_size:
        return [
            f"reward.load: {model.load} has {shape.vocab_size} tokens, and the policy's tokenizer has "
            f"ids up to {own.size - 1}: {way_out}"
        ]
    if others is None or own.same_ids(others):
        return []
    return [
        f"reward.load: {model.load} has a tokenizer with other ids than the policy's, so it would read "
        f"other text than was sampled; {way_out}"
    ]
