"""Python interface of csrc: one file per op, with its fake and autograd registrations.

Importing this package loads megarl._C; without it NativeOpsUnavailable says how to build it.
"""

from megarl.ops._load import NativeOpsUnavailable
from megarl.ops._shards import NumericsError
from megarl.ops.linear_token_logprob import linear_token_logprob
from megarl.ops.linear_vocab_kl import linear_vocab_kl
from megarl.ops.policy_loss import PolicyLoss, PolicyLossOptions, policy_loss
from megarl.ops.support import linear_support_min_logit, support_min_logit
from megarl.ops.token_logprob import TokenLogprobs, token_logprob
from megarl.ops.vocab_kl import vocab_kl, vocab_kl_topk

__all__ = [
    "NativeOpsUnavailable",
    "NumericsError",
    "PolicyLoss",
    "PolicyLossOptions",
    "TokenLogprobs",
    "linear_support_min_logit",
    "linear_token_logprob",
    "linear_vocab_kl",
    "policy_loss",
    "support_min_logit",
    "token_logprob",
    "vocab_kl",
    "vocab_kl_topk",
]
