"""Models that run transplants: instances of the recipient's own class."""
