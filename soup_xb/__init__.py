"""Fine-tune a language model with LoRA from one YAML file, on PyTorch or on Apple MLX."""

__version__ = "0.1.0"
