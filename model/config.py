"""ModelConfig: every number that shapes the network, under the field's own names."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from model.bounds import out_of_bounds

ROPE_SCALING_KEYS = (
    "rope_type",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
)


def _is_number(value: object) -> bool:
    """An int or float, finite and fit for float arithmetic (10**400 is an int, and no float)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _at_least(low: float) -> dict:
    return {"min": low}


def _between(low: int, high: int) -> dict:
    """`high` lies far above any model that fits a machine: a slip of the hand ends in a sentence, not in a full memory."""
    return {"min": low, "max": high}


@dataclass
class ModelConfig:
    """Shape and behaviour of a decoder. Raises ValueError, naming key, value and remedy, if it cannot be built."""

    vocab_size: int = field(default=6400, metadata=_between(8, 2**22))
    hidden_size: int = field(default=512, metadata=_between(1, 2**17))
    intermediate_size: int | None = field(
        default=None, metadata=_between(1, 2**20)
    )  # dense FFN; null: 8/3 hidden_size rounded up to 64
    moe_intermediate_size: int | None = field(
        default=None, metadata=_between(1, 2**20)
    )  # one expert; null: intermediate_size
    num_hidden_layers: int = field(default=8, metadata=_between(1, 1024))
    num_attention_heads: int = field(default=8, metadata=_between(1, 4096))
    num_key_value_heads: int | None = field(default=None, metadata=_between(1, 4096))  # null: num_attention_heads
    head_dim: int | None = field(default=None, metadata=_between(2, 2**17))  # null: hidden_size / num_attention_heads
    max_position_embeddings: int = field(default=512, metadata=_between(2, 2**24))  # longest context, tokens
    rope_theta: float = field(default=10000.0, metadata={"min": 0.0, "exclusive": True})
    rope_scaling: dict | None = None  # YaRN: {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 512}
    rms_norm_eps: float = field(default=1e-6, metadata={"min": 0.0, "exclusive": True})
    hidden_act: str = field(default="silu", metadata={"choices": ("silu", "gelu", "relu")})
    gated_ffn: bool = True  # act(gate x) * up x, as in SwiGLU; false: act(up x), two matrices
    use_qk_norm: bool = False  # RMSNorm of each query and key head
    attention_bias: bool = False  # biases on the q, k, v and o projections
    tie_word_embeddings: bool = True  # the head shares the embedding's matrix
    dropout: float = field(
        default=0.0, metadata={"min": 0.0, "max": 0.99}
    )  # on embeddings, attention weights and both residual branches
    initializer_range: float = field(default=0.02, metadata={"min": 0.0, "exclusive": True})
    zero_init_output: bool = False  # o_proj and every down_proj start at zero: each layer starts as the identity

    n_routed_experts: int = field(default=4, metadata=_between(0, 2**14))  # 0: a dense model
    n_shared_experts: int = field(
        default=1, metadata=_between(0, 1024)
    )  # always-on experts, one FFN of this many widths
    shared_expert_gate: bool = False  # the shared output times sigmoid of a linear map of the token, as in Qwen2-MoE
    num_experts_per_tok: int = field(default=2, metadata=_between(1, 2**14))
    first_k_dense_replace: int = field(default=0, metadata=_between(0, 1024))  # the first so many layers are dense
    mlp_only_layers: list[int] = field(default_factory=list)  # further layers that are dense, by index from 0
    scoring_func: str = field(default="softmax", metadata={"choices": ("softmax", "sigmoid")})
    norm_topk_prob: bool = True  # the k weights of a token sum to routed_scaling_factor
    routed_scaling_factor: float = field(default=1.0, metadata={"min": 0.0, "exclusive": True})
    aux_loss_level: str = field(default="sequence", metadata={"choices": ("none", "sequence", "batch", "global")})
    aux_loss_alpha: float = field(default=0.01, metadata=_at_least(0.0))  # weight of the balance loss
    router_z_loss_coef: float = field(default=0.0, metadata=_at_least(0.0))
    router_bias_update_rate: float = field(
        default=0.0, metadata=_at_least(0.0)
    )  # auxiliary-loss-free balance; 0: no bias
    router_jitter_noise: float = field(
        default=0.0, metadata={"min": 0.0, "max": 0.99}
    )  # training: input times U(1-j, 1+j)
    expert_backend: str = field(default="auto", metadata={"choices": ("auto", "loop", "grouped")})

    def __post_init__(self) -> None:
        self._check_bounds()
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"num_attention_heads: {self.num_attention_heads} does not divide hidden_size: {self.hidden_size}; "
                    "change one, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_attention()
        self._check_experts()

    def _check_bounds(self) -> None:
        """The loader of YAML files checks these too, with the file's name; this is for callers from Python."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and (wrong := out_of_bounds(value, f.metadata)):
                raise ValueError(f"{f.name}: {value!r:.60} {wrong}")

    def _check_attention(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} must be even, because rotary positions turn pairs of numbers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads: {self.num_attention_heads}; use a divisor of it"
            )
        if self.rope_scaling is None:
            return
        for key in self.rope_scaling:
            if key not in ROPE_SCALING_KEYS:
                raise ValueError(f"rope_scaling: unknown key {key!r:.60}; valid keys: {', '.join(ROPE_SCALING_KEYS)}")
        if self.rope_scaling.get("rope_type") != "yarn":
            raise ValueError(
                f"rope_scaling: rope_type {self.rope_scaling.get('rope_type')!r:.60} must be yarn, or rope_scaling null"
            )
        for key in ("factor", "original_max_position_embeddings"):
            value = self.rope_scaling.get(key)
            if not _is_number(value) or value < 1:
                raise ValueError(f"rope_scaling: {key}: {value!r:.60} must be a number of at least 1")
        for key in ("beta_fast", "beta_slow", "attention_factor"):
            value = self.rope_scaling.get(key)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"rope_scaling: {key}: {value!r:.60} must be a number above 0, or left out")

    def _check_experts(self) -> None:
        if len(set(self.mlp_only_layers)) < len(self.mlp_only_layers):
            raise ValueError("mlp_only_layers: a layer is named twice; name each one once")
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"mlp_only_layers: layer {layer!r:.60} is outside 0 to {self.num_hidden_layers - 1}, the layers there are"
                )
        if self.n_routed_experts == 0:
            return
        if self.shared_expert_gate and self.n_shared_experts == 0:
            raise ValueError(
                "shared_expert_gate: true, but n_shared_experts: 0 leaves nothing to gate; set n_shared_experts or "
                "shared_expert_gate: false"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} is more than n_routed_experts: {self.n_routed_experts}; "
                "a token cannot choose more experts than there are"
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob and self.n_routed_experts > 1:
            raise ValueError(
                "num_experts_per_tok: 1 with norm_topk_prob: true makes every weight 1, so the router would get no "
                "gradient from the language-model loss; set norm_topk_prob: false"
            )

    @property
    def output_std(self) -> float:
        """Of the initial weights that write into the residual stream, o_proj and every down_proj: initializer_range / sqrt(2 L), so
        that 2 L additions keep its scale (GPT-2); 0 with zero_init_output, as in modded-nanogpt and nanochat. The random numbers are
        drawn all the same, so that all other weights are what they are without it."""
        return 0.0 if self.zero_init_output else self.initializer_range / (2 * self.num_hidden_layers) ** 0.5

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) has routed experts."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace and layer not in self.mlp_only_layers

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the layers with routed experts."""
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]
