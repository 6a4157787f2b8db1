"""The model of a runner."""

from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import Runner


def model_of(runner: Runner) -> BaseModel:
    """The model itself, out of DistributedDataParallel or another wrapper."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
