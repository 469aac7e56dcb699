"""The training algorithms, one page each, in data order."""
