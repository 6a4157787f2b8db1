"""Our own studies as data: tables like the paper's, of trainings for two CPU cores."""

from .classification import CLASSIFICATION, CLASSIFICATION_RATES
from .fine_tuning import FINE_TUNING
from .small_batches import SMALL_BATCHES

STUDY = (*SMALL_BATCHES, FINE_TUNING, CLASSIFICATION, CLASSIFICATION_RATES)
