"""What can be seen of each answer from outside: observers, metrics, spans, log lines. Never text."""
