"""Model families: one file each. To add one, write its file and register it here."""

from __future__ import annotations

from r1zero.models.deepseek_v3 import DeepseekV3
from r1zero.models.family import register
from r1zero.models.llama import Llama
from r1zero.models.mistral import Mistral
from r1zero.models.olmo2 import Olmo2
from r1zero.models.qwen2 import Qwen2
from r1zero.models.qwen3 import Qwen3
from r1zero.models.qwen3_moe import Qwen3Moe

register(Qwen2())
register(Qwen3())
register(Qwen3Moe())
register(DeepseekV3())
register(Llama())
register(Mistral())
register(Olmo2())
