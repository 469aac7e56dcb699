"""The loops that jobs share: online, offline and evaluation."""
