"""Networks of real Bitcoin Core nodes on this machine; knows nothing of training."""
