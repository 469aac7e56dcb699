"""The vLLM engine: the driver's handle, its actor process, its workers."""
