"""Where the tokenizer of a reward model is, and its chat template. Needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from r1zero.config.parse import read_json
from r1zero.config.schema import Config
from r1zero.data.vocabulary import CONFIG
from r1zero.errors import BadInput

# In place of a template's name: the chat template that a tokenizer brings along.
OF_TOKENIZER = "tokenizer_template"
JINJA = "chat_template.jinja"  # where newer tokenizers have it


def tokenizer_folder(cfg: Config, model_folder: Path) -> Path:
    """Where the tokenizer of the reward model is: its own, else beside its weights."""
    return Path(cfg.reward.tokenizer_name_or_path or model_folder)


def chat_template(folder: Path) -> str | None:
    """The chat template of the tokenizer in a folder; None when it has none."""
    if (folder / JINJA).is_file():
        try:
            return (folder / JINJA).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadInput(f"{folder / JINJA} is no text in UTF-8; copy it again") from None
    if not (folder / CONFIG).is_file():
        return None
    content = read_json(folder / CONFIG)
    found = content.get("chat_template") if isinstance(content, dict) else None
    if isinstance(found, list):  # several by name
        named = {entry["name"]: entry["template"] for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
