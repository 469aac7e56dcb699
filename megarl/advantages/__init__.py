"""Advantages: from rewards to what the policy loss multiplies ratios with."""

from megarl.advantages.group import group_advantages, zero_std_fraction

__all__ = ["group_advantages", "zero_std_fraction"]
