"""What an operator does while the server runs: switch, share, reload, logs of scores, labels, audits, drift."""
