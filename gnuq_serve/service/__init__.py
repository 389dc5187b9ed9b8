"""What stands between a response and the scorer; knows nothing of vLLM's code, only of its HTTP answers."""
