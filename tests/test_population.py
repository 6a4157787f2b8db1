"""The statistics of a population are those of the training images under the final weights, and change nothing else."""

import copy

import pytest
import torch
from conftest import Net, runner_for
from torch import nn

from mmdet_cbn import CBN
from mmdet_cbn.experiments.study.population import PopulationStatisticsHook

pytestmark = pytest.mark.usefixtures('trains_on_cpu')


def train(tmp_path, *hooks):
    torch.manual_seed(0)
    model = Net(nn.BatchNorm2d(4))
    runner = runner_for(tmp_path, model, hooks[0] if hooks else None, epochs=3, batch_size=2)
    runner.train()
    return runner, model


def test_they_are_of_all_batches_under_the_final_weights(tmp_path):
    runner, model = train(tmp_path / 'a', PopulationStatisticsHook())
    _, plain = train(tmp_path / 'b')
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    batches = [model.conv(torch.stack(data['inputs'])) for data in runner.train_dataloader]
    assert len(batches) > 1
    mean = torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
    torch.testing.assert_close((model.norm.running_mean, model.norm.running_var), (mean, var))
    assert model.norm.momentum == 0.1


def test_it_takes_no_more_batches_than_asked(tmp_path):
    _, model = train(tmp_path, PopulationStatisticsHook(batches=1))
    assert model.norm.num_batches_tracked == 1


def test_frozen_norms_keep_their_statistics(tmp_path):
    torch.manual_seed(0)
    model = Net(nn.BatchNorm2d(4))
    model.norm.train = lambda mode=True: nn.Module.train(model.norm, False)
    before = copy.deepcopy(list(model.norm.buffers()))
    runner_for(tmp_path, model, PopulationStatisticsHook(), epochs=1).train()
    torch.testing.assert_close(list(model.norm.buffers()), before)


def test_batches_is_checked():
    with pytest.raises(ValueError, match='PopulationStatisticsHook: batches must be an int >= 1, got 0'):
        PopulationStatisticsHook(batches=0)


def test_other_batch_normalizers_are_refused(tmp_path):
    runner = runner_for(tmp_path, Net(CBN(4)), PopulationStatisticsHook(), epochs=1)
    with pytest.raises(RuntimeError, match=r"for BatchNorm alone, but 'norm' is CBN\(4"):
        runner.train()
