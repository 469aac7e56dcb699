"""What a run tells people: timers, metric sinks, the console and the HTML report."""
