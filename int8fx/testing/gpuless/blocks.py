"""Small blocks of real architectures, with outliers in what their linears read."""

import torch
import transformers
from torch import Tensor, nn

WIDTH = 64
_SEED = 0


def llama(**changed: object) -> nn.Module:
    """One decoder layer and the final norm: q/k/v, o, gate/up, down; grouped queries."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        attn_implementation="eager",
        **changed,
    )
    return _finished(Hidden(transformers.LlamaModel(config)), config.dtype)


def gpt2() -> nn.Module:
    """One layer: ``Conv1D`` with biases, LayerNorm, gelu."""
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=1, n_head=4, vocab_size=128, attn_implementation="eager"
    )
    return _finished(Hidden(transformers.GPT2Model(config)))


def t5() -> nn.Module:
    """One encoder layer: relative positions, RMSNorm without a cast, relu."""
    config = transformers.T5Config(
        d_model=WIDTH, d_kv=16, d_ff=160, num_layers=1, num_heads=4, vocab_size=128
    )
    return _finished(Hidden(transformers.T5EncoderModel(config)))


def moe() -> nn.Module:
    """A norm and four experts that read the same tokens, mixed by a top-2 router."""
    return _finished(_Experts(WIDTH, 96, experts=4))


_SIZES = {"hidden_size": WIDTH, "intermediate_size": 96, "num_experts_per_tok": 2}


def mixtral() -> nn.Module:
    """A norm and Mixtral's experts: rows sorted for ``grouped_mm``."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(num_local_experts=5, **_SIZES)
    return _finished(Routed(MixtralSparseMoeBlock, config, "grouped_mm"))


def qwen_moe() -> nn.Module:
    """The same of Qwen2-MoE, with a shared expert beside them, which is three linears."""
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    sizes = {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 80}
    config = transformers.Qwen2MoeConfig(num_experts=8, **_SIZES, **sizes)
    return _finished(Routed(Qwen2MoeSparseMoeBlock, config, "grouped_mm"))


def gpt_oss() -> nn.Module:
    """The same of GPT-OSS: transposed weights with biases, an indexed copy of them for each row."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = transformers.GptOssConfig(num_local_experts=6, **_SIZES)
    return _finished(Routed(GptOssMLP, config, "batched_mm"))


class Routed(nn.Module):
    """A norm, experts of transformers' behind it, and the residual."""

    def __init__(self, block: type, config: transformers.PretrainedConfig, implementation: str) -> None:
        super().__init__()
        config._experts_implementation = implementation
        self.norm, self.block = nn.RMSNorm(config.hidden_size), block(config)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


class Hidden(nn.Module):
    """A transformers model from hidden states to hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        options = {} if "T5" in type(self.model).__name__ else {"use_cache": False}
        return self.model(inputs_embeds=x, **options).last_hidden_state


class _Experts(nn.Module):
    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.gate = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(experts))
        self.up = nn.ModuleList(nn.Linear(width, hidden, bias=False) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(hidden, width, bias=False) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, chosen = self.router(h).softmax(-1).topk(2)
        y = x
        for index in range(len(self.gate)):
            share = (weights * (chosen == index)).sum(-1, keepdim=True)
            hidden = nn.functional.silu(self.gate[index](h)) * self.up[index](h)
            y = y + share * self.down[index](hidden)
        return y


def _finished(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Random weights of a usual size, and two norm channels that make outliers."""
    generator = torch.Generator().manual_seed(_SEED)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = parameter.shape[-1] ** -0.5
            parameter.data.normal_(0.0, scale, generator=generator)
        elif name.endswith("weight"):
            parameter.data[[3, 17]] = 12.0
    return model.requires_grad_(False).eval()


def tokens(shape: tuple[int, ...], dtype: torch.dtype, seed: int = _SEED) -> Tensor:
    """Hidden states ``[*shape, WIDTH]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, WIDTH, generator=generator).to(dtype)


BLOCKS = {
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "moe": moe,
    "mixtral": mixtral,
    "qwen_moe": qwen_moe,
    "gpt_oss": gpt_oss,
}
