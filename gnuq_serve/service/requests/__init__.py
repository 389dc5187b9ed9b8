"""What a client asks: read, capped, and turned into what vLLM is asked."""
