"""Random numbers belong to samples: however a global batch is cut, sample i gets the same."""

import pytest
import torch

from diffusers_wadi.distillation.noise import SampleDraws

# (processes, micro-batches, batch): eight samples each time
CUTS = [(1, 1, 8), (2, 1, 4), (1, 2, 4), (2, 2, 2), (4, 1, 2), (1, 8, 1)]


def global_batch(cut: tuple[int, int, int], rounds: int = 2, seed: int = 5) -> dict[str, torch.Tensor]:
    """Everything drawn in the last round, in the global order."""
    processes, micros, batch = cut
    streams = [SampleDraws(seed, batch, rank, processes) for rank in range(processes)]
    parts = {"normal": [], "integers": [], "sample": [], "batch": []}
    for _ in range(rounds):
        for stream in streams:
            stream.next_round()
    for micro in range(micros):
        for stream in streams:
            stream.micro = micro
            parts["normal"].append(stream.normal("z", (2, 3)))
            parts["integers"].append(stream.integers("t", 20, 980))
            parts["sample"].append(stream.uniform("drop"))
            parts["batch"].append(stream.uniform("drop", "batch"))
    return {name: torch.cat(values) for name, values in parts.items()}


@pytest.mark.parametrize("cut", CUTS[1:], ids=str)
def test_the_cut_does_not_matter(cut):
    whole, cut_up = global_batch(CUTS[0]), global_batch(cut)
    assert all(torch.equal(whole[name], cut_up[name]) for name in whole)


def test_samples_rounds_names_and_seeds_differ():
    stream = SampleDraws(0, 4)
    drawn = [stream.normal("z", (3,)), stream.normal("noise", (3,))]
    stream.next_round()
    drawn += [stream.normal("z", (3,)), SampleDraws(1, 4).normal("z", (3,))]
    rows = torch.cat(drawn)
    assert len(rows.unique(dim=0)) == len(rows) == 16
    assert len(stream.uniform("drop", "batch").unique()) == 1 and len(stream.uniform("drop").unique()) == 4


def test_distributions():
    stream = SampleDraws(0, 2000)
    normal, integers = stream.normal("z", (10,)), stream.integers("t", 20, 22)
    assert normal.dtype == torch.float32 and abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert integers.dtype == torch.int64 and integers.unique().tolist() == [20, 21, 22]
    uniform = stream.uniform("w", "sample", 2.0, 7.0)
    assert uniform.min() >= 2 and uniform.max() <= 7 and abs(uniform.mean() - 4.5) < 0.2


def test_goes_on_where_it_stood():
    stream, other = SampleDraws(3, 2), SampleDraws(3, 2)
    for _ in range(4):
        stream.next_round()
    other.load_state_dict(stream.state_dict())
    assert torch.equal(stream.normal("z", (3,)), other.normal("z", (3,)))
    with pytest.raises(ValueError, match="seed=3.*seed=4.*--seed"):
        SampleDraws(4, 2).load_state_dict(stream.state_dict())
