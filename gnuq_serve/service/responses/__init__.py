"""What goes out: answers read from responses, uncertainties put in, and what is uncertain held back."""
