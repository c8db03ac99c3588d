"""Types of configuration keys: how a value is converted, its bounds, its choices.

They stand in the annotations of `r1zero/config/schema.py`; pydantic applies them. Each says its own
mistake as the end of a sentence that `r1zero/config/validate.py` begins with the name of the key.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    PlainValidator,
    ValidationError,
    WrapValidator,
)
from pydantic import ValidatorFunctionWrapHandler as Convert
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from r1zero.config.parse import LARGEST, NO_VALUE, UNWRITABLE, as_list, as_number, spelled
from r1zero.errors import BadInput, nearest, shown

T = TypeVar("T")

# Column of each part of a problem when `map_keys` says nothing else; "" = there is none.
MAP_KEYS = {
    "prompt": "question",
    "query": "",
    "response": "ground_truth_answer",
    "system": "",
    "category": "",
}


# -- mistakes -------------------------------------------------------------------------------------

WRONG_VALUE = "wrong_value"
UNKNOWN_KEY = "unknown_key"


def wrong(sentence: str) -> PydanticCustomError:
    """The error of a value; the key goes in front: `training.seed: SENTENCE`."""
    return PydanticCustomError(WRONG_VALUE, "{sentence}", {"sentence": sentence})


def unknown(hint: str) -> PydanticCustomError:
    """The error of a key that does not exist: `training.map_keys.answer is unknownHINT`."""
    return PydanticCustomError(UNKNOWN_KEY, "{hint}", {"hint": hint})


def _convert(value: Any, convert: Convert, original: Any, words: str) -> Any:
    """Let pydantic convert `value`; its refusal is told with what the user wrote."""
    try:
        return convert(value)
    except ValidationError:
        raise wrong(f"{original!r} must be {words}") from None


# -- kinds of values ------------------------------------------------------------------------------


def _whole(value: Any, convert: Convert) -> int:
    """Without loss: 6.0 and '1e6' are whole, 1.5 and true are not."""
    words = "a whole number"
    number = as_number(value)
    if isinstance(number, bool):
        raise wrong(f"{value!r} must be {words}")
    if isinstance(number, int | float) and LARGEST < abs(number) < math.inf:
        raise wrong(f"{value!r:.40} is too large: whole numbers go up to {LARGEST}")
    return int(_convert(number, convert, value, words))


def _number(value: Any, convert: Convert) -> float:
    """A finite number."""
    words = "a number"
    if isinstance(value, bool):
        raise wrong(f"{value!r} must be {words}")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise wrong(f"{value!r:.40} is too large: numbers go up to {sys.float_info.max:.1e}")
    return float(_convert(as_number(value), convert, value, words))


def _flag(value: Any, convert: Convert) -> bool:
    """True or false, in any case; 1, yes and on are not taken for it."""
    words = "true or false"
    if str(value).lower() not in ("true", "false"):
        raise wrong(f"{value!r} must be {words}")
    return bool(_convert(value, convert, value, words))


def _text(value: Any, convert: Convert) -> str:
    """One line; a block of YAML ends with a line break, which is none of the text's."""
    words = "a text"
    text = str(_convert(value, convert, value, words)).removesuffix("\n")
    if UNWRITABLE.search(text):
        raise wrong(f"{value!r} must be {words}")
    return text


Whole = Annotated[int, WrapValidator(_whole)]
Number = Annotated[float, Field(allow_inf_nan=False), WrapValidator(_number)]
Flag = Annotated[bool, WrapValidator(_flag)]
Text = Annotated[str, Field(coerce_numbers_to_str=True), WrapValidator(_text)]


def _no_word(value: Any) -> Any:
    if isinstance(value, str) and value in NO_VALUE:
        raise wrong(f"{value} is a word to YAML; write null for no value")
    return value


def _list(value: Any) -> list[Any]:
    entries = as_list(value)
    if not isinstance(entries, list):
        if isinstance(value, str) and "[" in value:
            raise wrong(f"{value!r} is no list: its brackets or quotation marks do not match")
        raise wrong(f"{value!r} must be a list, such as [{value}]")
    return entries


def _section(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(f"{value!r} must be a section with keys")
    return {key: entry for key, entry in spelled(value).items() if entry is not None}


def _settings(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(f"{value!r} must be a section with keys")
    return spelled(value)


# A section whose keys only its reader knows.
Settings = Annotated[dict[str, Any], BeforeValidator(_settings)]
# null is one of its values; words of other languages for it are refused.
OrNull = Annotated[T | None, BeforeValidator(_no_word)]
Listed = Annotated[list[T], BeforeValidator(_list)]
# Keys below a key; one that is null has its default.
Section = Annotated[T, BeforeValidator(_section)]


def _named(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(f"{value!r} must map names to what they stand for")
    entries = spelled(value)
    for name in entries:
        if not NAME.fullmatch(name):
            raise wrong(f"{name!r} must be a name of letters, digits, _ and ., such as math500")
    return {name: entry for name, entry in entries.items() if entry is not None}


NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")
# Entries under names that the user chooses; one that is null is not there.
Named = Annotated[dict[str, T], BeforeValidator(_named)]


# What pydantic calls the two forms of a key where it tells of a mistake.
ONE = "<one>"
BY_NAME = "<by name>"


def one_or_named() -> Discriminator:
    """A key that holds one value, or a mapping from names to entries."""
    return Discriminator(lambda value: BY_NAME if isinstance(value, dict) else ONE)


def text_for(key: str) -> BeforeValidator:
    """A section that may be written as a text, which is the value of its key `key`."""

    def as_section(value: Any) -> Any:
        return {key: value} if isinstance(value, str) else value

    return BeforeValidator(as_section)


# -- bounds and choices ---------------------------------------------------------------------------


def rule(holds: Callable[[Any], bool], must: str) -> AfterValidator:
    """What a converted value must meet, and the sentence that says so: `must be ...`."""

    def check(value: T) -> T:
        if not holds(value):
            raise wrong(f"{shown(value)} {must}")
        return value

    return AfterValidator(check)


def between(low: float, high: float, such_as: float) -> AfterValidator:
    """Both ends belong to it."""
    return rule(
        lambda value: low <= value <= high, f"must be from {low} to {high}, such as {such_as}"
    )


def at_least(least: float) -> AfterValidator:
    return rule(lambda value: value >= least, f"must be at least {least}")


NOT_NEGATIVE = rule(lambda value: value >= 0, "must not be negative; 0 is the least")
BELOW_1 = rule(lambda value: 0 <= value < 1, "must be at least 0 and below 1, such as 0.9")


def always(value: Any, reason: str) -> AfterValidator:
    """A key of old configurations that can only say what holds anyway."""
    return rule(lambda given: given == value, f"must be {shown(value)}: {reason}")


def readable_as(read: Callable[[str], object]) -> AfterValidator:
    """A text that `read` takes. It raises BadInput with the sentence for others."""

    def check(text: str) -> str:
        try:
            read(text)
        except BadInput as error:
            raise wrong(str(error)) from None
        return text

    return AfterValidator(check)


class Choice:
    """One of the texts of a Literal."""

    def __init__(self, **why_not: str) -> None:
        """`why_not` gives reasons for refused words that users know from elsewhere."""
        self.why_not = why_not

    def __get_pydantic_core_schema__(self, source: Any, _: GetCoreSchemaHandler) -> CoreSchema:
        known = get_args(source)

        def check(value: Any) -> Any:
            if value in known:
                return value
            if UNWRITABLE.search(str(value)):
                raise wrong(f"{value!r} must be a text")
            reason = self.why_not.get(str(value))
            hint = nearest(str(value), known) if reason is None else f": {reason}"
            raise wrong(f"{value} is not one of {', '.join(known)}{hint}")

        return core_schema.no_info_plain_validator_function(check)


OneOf = Annotated[T, Choice()]
Count = Annotated[Whole, at_least(1)]


def _layers(value: Any) -> Any:
    """MindSpeed's "7,8,7" is a list, too."""
    if isinstance(value, str) and "," in value and "[" not in value:
        return [part.strip() for part in value.split(",")]
    return value


LayerList = Annotated[Listed[Count], BeforeValidator(_layers)]


def _categories(value: Any) -> Any:
    """One number for all data sets, or one for each, as MindSpeed-LLM's "1,0"."""
    if isinstance(value, int) or (isinstance(value, str) and value.strip() in ("0", "1")):
        return [value]
    return _layers(value)


# What scores responses where there is a reward model: 1 the reward functions, 0 the model.
Category = Annotated[Whole, rule(lambda value: value in (0, 1), "must be 1 (rules) or 0 (model)")]
Categories = Annotated[Listed[Category], BeforeValidator(_categories)]


def _layer_freq(value: Any) -> int | list[int]:
    freq = as_list(value)
    if type(freq) is int and (freq == -1 or freq >= 1):
        return freq
    if isinstance(freq, list) and all(type(entry) is int and entry in (0, 1) for entry in freq):
        return freq
    raise wrong(f"{value!r} must be 1, N for every Nth layer, or a list with 0 or 1 for each layer")


# Which layers have experts, as Megatron says it; -1 of MindSpeed-LLM is all.
LayerFreq = Annotated[int | list[int], PlainValidator(_layer_freq)]


# -- paths ----------------------------------------------------------------------------------------


class _NamesFiles:
    """Marks texts in which `~` and variables are expanded when the configuration is resolved."""


FilePath = Annotated[Text, _NamesFiles()]


def names_files(hint: Any) -> bool:
    """Whether values of this type, or those in its lists, are file paths."""
    metadata = getattr(hint, "__metadata__", ())
    if any(isinstance(entry, _NamesFiles) for entry in metadata):
        return True
    return any(names_files(inner) for inner in get_args(hint))


ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / ".cache"  # where tools/make_tiny.py puts its models and data
EMBEDDED_NAMES = ("tiny", "tiny_moe", "tiny_mla")


def embedded(part: str) -> AfterValidator:
    """Turn `embedded:tiny` into the place of its model, train or eval part, and so the other embedded
    ones; others stay.

    `embedded:tiny/eval` names the part itself.
    """
    parts = {"model": "model", "train": "train.parquet", "eval": "eval.parquet"}

    def place(path: str) -> str:
        if not path.startswith("embedded:"):
            return path
        name, _, chosen = path.removeprefix("embedded:").partition("/")
        if name not in EMBEDDED_NAMES or (chosen or part) not in parts:
            names = ", ".join(f"embedded:{entry}" for entry in EMBEDDED_NAMES)
            known = ", ".join(f"embedded:tiny/{entry}" for entry in parts)
            raise wrong(f"{path} is unknown; embedded are {names} and, of their parts, {known}")
        return str(EMBEDDED / name / parts[chosen or part])

    return AfterValidator(place)


# -- columns of the data --------------------------------------------------------------------------


def _part(name: str) -> str:
    if name not in MAP_KEYS:
        raise unknown(f"{nearest(name, MAP_KEYS)}; known are {', '.join(MAP_KEYS)}")
    return name


def _columns(value: Any) -> dict[str, str]:
    """A mapping of some parts to columns, also as a JSON string."""
    given = value
    if isinstance(value, str):
        try:
            given = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise wrong(f"{value!r} is not a JSON object: {error}") from None
    if not isinstance(given, dict) or not all(
        isinstance(name, str | None) for name in given.values()
    ):
        raise wrong(f"{value!r} must map {', '.join(MAP_KEYS)} to columns of the data")
    return {part: column or "" for part, column in spelled(given).items()}


Columns = Annotated[dict[Annotated[str, AfterValidator(_part)], str], BeforeValidator(_columns)]
