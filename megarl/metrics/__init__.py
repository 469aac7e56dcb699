"""Timers, metric sinks, the console and the HTML report of a run."""
