"""What the network computes. Imports torch alone.

Shape letters, used in every comment of this package:
B batch, T tokens of a row, N = B*T tokens, D hidden size, H query heads, E experts, k experts per token,
F expert width, V vocabulary.
"""

from model.config import ModelConfig
from model.decoder import CausalLMOutput, MoEForCausalLM

__all__ = ["CausalLMOutput", "ModelConfig", "MoEForCausalLM"]
