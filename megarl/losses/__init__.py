"""Losses over the tokens of a packed microbatch; see :mod:`megarl.losses.base` for the interface."""
