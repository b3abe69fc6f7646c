"""How far a network's confidence can be trusted."""

from picnn_fast.evaluation.figures.record import Figure
from picnn_fast.losses import cross_entropy
from picnn_fast.metrics import CalibrationError, MeanOverImages

FIGURES: dict[str, Figure] = {
    "calibration_error": Figure(
        heading="ECE",
        meaning="expected calibration error: accuracy apart from confidence, in 15 bins of it",
        better="lower",
        reading=(
            "Lower is better: 0 where as many images are right as their confidence says, as of a"
            " guess at chance that knows it is one; a plain network trained to the end is often"
            " surer than it is right. Of few images it is too high by chance, and its interval,"
            " which takes that off, may lie below it."
        ),
        metric=lambda network, data, draws: CalibrationError(network.num_classes),
        update=lambda metric, seen: metric.update(seen.logits, seen.labels),
    ),
    "negative_log_likelihood": Figure(
        heading="NLL",
        meaning="negative log-likelihood of the true class, nats",
        better="lower",
        reading=(
            "Lower is better: chance gives the logarithm of the number of classes, a plain network"
            " is trained to give less, and mistakes that it is sure of add much."
        ),
        metric=lambda network, data, draws: MeanOverImages(),
        update=lambda metric, seen: metric.update(cross_entropy(seen.logits, seen.labels)),
    ),
}
