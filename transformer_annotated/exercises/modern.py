"""The exercises of Part III."""

from typing import Any

import torch

from transformer_annotated.exercises import close, exercise

# Chapter 25: language_model (end)

# Chapter 26: pre_ln (end)

# Chapter 27: rms_norm (end)

# Chapter 28: gated (end)

# Chapter 29: rope (end)

# Chapter 30: relative_bias (end)

# Chapter 31: long_context (end)

# Chapter 32: grouped_query (end)

# Chapter 33: window (end)

# Chapter 34: experts (end)

# Chapter 35: ablation (end)

# Chapter 36: production (end)
