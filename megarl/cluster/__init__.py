"""Processes and hosts: Ray, collectives of the control group, heartbeats, devices, environment variables."""
