"""The loops shared by jobs: online, offline and evaluation."""
