"""Bytes to bytes, without network, clock or files: the Python twin of bitcoind-patch/src/training/."""
