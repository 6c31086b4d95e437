"""align_kit: fine-tune and align language models on DeepSpeed ZeRO-3, and prove what was done."""

__version__ = "0.1.0"
