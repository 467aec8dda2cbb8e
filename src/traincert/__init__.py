"""Traincert: a regtest chain whose blocks are earned by training (after arXiv 2508.12138)."""
