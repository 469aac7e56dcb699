"""The loops: each algorithm on one page, in data order."""
