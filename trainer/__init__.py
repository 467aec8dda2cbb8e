"""One cycle of collaborative training (PyTorch); knows nothing of Bitcoin."""
