"""Randomness depends on its key alone, and processes share the draws of one global batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.randomness import Draws, generator

CPU = torch.device("cpu")


def all_of(size: int, mine: slice, seed: int = 0) -> tuple[Tensor, Tensor, float, int, Tensor]:
    draws = Draws((seed, "augment", 1, 2), size, mine, CPU)
    return draws.uniform(), draws.integers(7, 3), draws.number(), draws.seed(), draws.uniform(2)


def test_the_same_key_draws_the_same_and_another_key_another() -> None:
    def drawn(*key: object) -> list[float]:
        return torch.rand(8, generator=generator(*key)).tolist()

    assert drawn(0, "order", 1) == drawn(0, "order", 1)
    keys = [(0, "order", 1), (1, "order", 1), (0, "augment", 1), (0, "order", 2), (0, "order", 1, 0), ("0", "order", 1)]
    assert len({tuple(drawn(*key)) for key in keys}) == len(keys)


def test_a_key_draws_the_same_in_another_process() -> None:
    code = "import torch; from training.randomness import generator as g; "
    code += "print(torch.randint(2**62, (3,), generator=g(5, 'order', 9)).tolist())"
    root = Path(__file__).parents[2]
    there = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert there.strip() == str(torch.randint(2**62, (3,), generator=generator(5, "order", 9)).tolist())


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = all_of(9, slice(None))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for one, other in zip(first, all_of(9, slice(None)), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 8, 11])
def test_processes_take_their_shares_of_what_one_would_draw(size: int, processes: int) -> None:
    whole = all_of(size, slice(None))
    shares = [slice(rank, size, processes) for rank in range(processes)]
    parts = [all_of(size, share) for share in shares]
    for share, part in zip(shares, parts, strict=True):
        for position in (0, 1, 4):
            assert torch.equal(torch.as_tensor(part[position]), torch.as_tensor(whole[position])[share])
        assert part[2:4] == whole[2:4]  # the same number and seed in every process


def test_what_is_drawn_lies_in_its_range_and_has_its_type() -> None:
    uniform, integers, number, seed, pairs = all_of(500, slice(None))
    assert (uniform.dtype, integers.dtype) == (torch.float32, torch.int64)
    assert (uniform.shape, integers.shape, pairs.shape) == ((500,), (500, 3), (500, 2))
    assert 0 <= float(uniform.min()) < 0.1 < 0.9 < float(uniform.max()) < 1
    assert set(integers.unique().tolist()) == set(range(7))
    assert 0 <= number < 1
    assert 0 <= seed < 2**31
