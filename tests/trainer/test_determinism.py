"""Switches that make results the same each time."""

import torch

from traincert.trainer.determinism import deterministic


def test_switches_are_set_inside_and_restored_after() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with deterministic():
            assert torch.get_num_threads() == 1
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
