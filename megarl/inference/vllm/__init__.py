"""The vLLM engine: the driver's handle, its actor process, and its workers."""
