"""The class of each architecture: the families' files, found by the names that a config.json gives them."""

from __future__ import annotations

from .bert import BertModel, RobertaModel, XLMRobertaModel
from .deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from .gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from .gpt import GPT2LMHeadModel
from .gpt_neox import GPTNeoXForCausalLM
from .gpt_oss import GptOssForCausalLM
from .layers import CausalLM
from .llama import LlamaForCausalLM
from .mistral import MistralForCausalLM
from .mixtral import MixtralForCausalLM
from .olmo2 import Olmo2ForCausalLM
from .olmo3 import Olmo3ForCausalLM
from .phi3 import Phi3ForCausalLM
from .qwen2 import Qwen2ForCausalLM
from .qwen2_moe import Qwen2MoeForCausalLM
from .qwen3 import Qwen3ForCausalLM
from .qwen3_moe import Qwen3MoeForCausalLM
from .smollm3 import SmolLM3ForCausalLM
from .starcoder2 import Starcoder2ForCausalLM

_ALL: tuple[type[CausalLM], ...] = (
    LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM, Phi3ForCausalLM,
    Olmo2ForCausalLM, Olmo3ForCausalLM, Gemma2ForCausalLM, Gemma3ForCausalLM, Starcoder2ForCausalLM, GPTNeoXForCausalLM,
    MixtralForCausalLM, Qwen2MoeForCausalLM, Qwen3MoeForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM,
    GptOssForCausalLM, GPT2LMHeadModel, BertModel, RobertaModel, XLMRobertaModel,
)  # fmt: skip
MODEL_CLASSES = {model.__name__: model for model in _ALL}
