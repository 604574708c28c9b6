"""Appendix G of PSG: lambda_s is found with two disjoint parts of the training images.

Everything is trained on the larger part, the epochs before the switch included, and scored on the
other. Among the strengths that keep the full precision of plain SGD, that of best low precision is
chosen; recipes then train anew on all images. With `--init` the network at the switch is the given
one, which has seen the held-out images, too: the row says so.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from experiments.psg import protocol
from quantjax.core.quantizer import Quantizer
from quantjax.lab import data
from quantjax.lab.deploy import deploy
from quantjax.lab.train import evaluation

HELD_OUT = 5000  # images; at most a tenth
# Percent points of full precision that may be lost. In table A1 the network of 3 bits is 1.2 below
# that of 8 bits, and that of 2 bits 3.0.
TOLERANCE = 1.5


class Found(NamedTuple):
    """What a search gave."""

    strength: float  # the chosen one
    scores: dict  # {strength: {"full precision": percent, "low precision": percent}}
    row: dict  # of the record


class Search(NamedTuple):
    """A protocol on a part of the training images; `begin` makes one, for all widths."""

    parts: protocol.Protocol  # its test images are the held-out ones
    start: Mapping  # variables at the switch
    plain: float  # accuracy of plain SGD's network in percent

    def choose(self, candidates: Iterable[float], train: Callable, quantizer: Quantizer) -> Found:
        """Returns the best of the strengths that do not degrade the full precision.

        Where all of them do, it is the one of best full precision, and the row says so.

        Args:
          candidates: strengths.
          train: (protocol, variables at the switch, strength) -> variables at the end.
          quantizer: what is deployed.
        """
        scores = {strength: self._scores(train, strength, quantizer) for strength in candidates}
        kept = {
            strength: score
            for strength, score in scores.items()
            if score["full precision"] >= self.plain - TOLERANCE
        }
        criterion = "low precision" if kept else "full precision"
        among = kept or scores
        best = max(among, key=lambda strength: among[strength][criterion])
        row = {
            "row": "strength by held-out images",
            "chosen": best,
            "full precision of SGD": self.plain,
            "of": scores,
        }
        if not kept:
            row["note"] = f"every strength loses more than {TOLERANCE} points of full precision"
        if self.parts.context.init is not None:
            row["start"] = "--init, which has seen the held-out images"
        return Found(best, scores, row)

    def _scores(self, train, strength, quantizer):
        try:
            variables = train(self.parts, self.start, strength)
        except FloatingPointError:
            return {"full precision": 0.0, "low precision": 0.0}
        return {
            "full precision": self.parts.accuracy(variables),
            "low precision": self.parts.accuracy(deploy(variables, quantizer).variables),
        }


def begin(parts: protocol.Protocol, seed: int) -> Search:
    """Trains plain SGD without the held-out images, which the seed draws, and returns the search.

    Args:
      parts: the protocol of the table, with all training images.
      seed: of the images that are held out, and of the training.
    """
    dataset = parts.task.dataset
    count = min(HELD_OUT, len(dataset.train.labels) // 10)
    rest, held_out = data.holdout(dataset.train, count, seed)
    task = parts.task._replace(dataset=dataset._replace(train=rest, test=held_out))
    smaller = parts._replace(task=task, evaluate=evaluation.make_evaluate(task), compiled={})
    start = smaller.plain(seed)
    return Search(smaller, start, smaller.accuracy(smaller.late("sgd", protocol.sgd, start, seed)))
