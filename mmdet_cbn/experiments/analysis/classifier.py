"""A plain backbone that learns which classes an image shows: what Figure 6 looks at besides detectors."""

from typing import Any

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.utils import ConfigType
from mmengine.model import BaseModel
from torch import Tensor, nn


@MODELS.register_module()
class MultiLabelClassifier(BaseModel):
    """One of mmdet's backbones, global average pooling and a linear layer, trained on the classes of the boxes.

    It is built for looking into its training, and predicts nothing.

    Args:
        backbone: Config of a backbone; its last output is used.
        in_channels: Channels of that output.
        num_classes: Classes of the data set.
        data_preprocessor: As of a detector.
    """

    def __init__(self, backbone: ConfigType, in_channels: int, num_classes: int, data_preprocessor: ConfigType) -> None:
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.fc = nn.Linear(in_channels, num_classes)

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """The backbone's outputs [N, C, H, W] for images [N, 3, H, W]."""
        return self.backbone(inputs)

    def forward(self, inputs: Tensor, data_samples: list[Any], mode: str = 'loss') -> dict[str, Tensor]:
        """Binary cross-entropy of each class, there or not, in the images [N, 3, H, W].

        Raises:
            NotImplementedError: ``mode`` is not ``'loss'``.
        """
        if mode != 'loss':
            raise NotImplementedError(f"MultiLabelClassifier can only train: mode must be 'loss', got {mode!r}")
        scores = self.fc(self.extract_feat(inputs)[-1].mean(dim=(2, 3)))
        targets = torch.stack(
            [scores.new_zeros(scores.shape[1]).index_fill_(0, s.gt_instances.labels, 1) for s in data_samples]
        )
        return dict(loss=F.binary_cross_entropy_with_logits(scores, targets))
