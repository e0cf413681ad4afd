"""What is said of how good a model is; computed in :mod:`metamoe.common.data.metrics`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """How good a model is on a set.

    Attributes:
        accuracy: in percent.
        interval: its 95% interval (Wilson 1927), in percent.
        count: samples.
        macro_f1: mean over the classes of F1, in percent; None for text, whose choices are no classes.
        balanced_accuracy: mean over the classes of the share that was recognised, in percent; None for text.
        calibration_error: expected calibration error in percent, with 15 bins of equal width (Guo et al. 2017).
        perplexity: of the right answers, exp of the mean loss of their tokens; None for images.
    """

    accuracy: float
    interval: tuple[float, float]
    count: int
    macro_f1: float | None
    balanced_accuracy: float | None
    calibration_error: float
    perplexity: float | None
