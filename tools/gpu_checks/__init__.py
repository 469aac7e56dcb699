"""The steps of tools/gpu_check.py, one file each: ``run(report)`` measures, checks and reports."""
