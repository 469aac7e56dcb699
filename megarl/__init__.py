"""MegaRL: post-training of large language models on Megatron-Core and vLLM.

Importing this package imports nothing heavy and patches nothing; see :mod:`megarl.platform`.
"""

__version__ = "0.1.0"
