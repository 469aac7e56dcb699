"""Advantages: the factors of the policy loss's ratios, computed from rewards."""

from megarl.advantages.group import group_advantages, zero_std_fraction

__all__ = ["group_advantages", "zero_std_fraction"]
