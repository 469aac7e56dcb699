"""`megarl plan`: GPU memory and weight-sync volume of a layout, without GPUs."""
