"""The scorer process and the server's side of it: who runs it, what waits for it, what they say to each other."""
