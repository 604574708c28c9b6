"""The rows of a comparison, trained: every seed of them, with as few compilations as can be."""

import time
from collections.abc import Callable

from quantjax import linen
from quantjax.core.quantizer import InputQuantizer
from quantjax.encoded import storage
from quantjax.lab import deploy, methods
from quantjax.lab.plans import Plan, full_precision
from quantjax.lab.report import rows as rows_lib
from quantjax.lab.report.rows import Result
from quantjax.lab.train import engine, evaluation, phases

CALIBRATED_ON = 512  # training examples, by the inputs of networks that did not train with them
POINTS = 10  # of a training curve


class Rows:
    """Trains rows on a task; what they have in common is trained and compiled once.

    Args:
      task: with the data set whose test examples judge them.
      model, dataset: names, for files.
      epochs: in full precision, and again for each row.
      batch_size: examples per step.
      seeds: one training each, of weights, order of examples and draws.
      inputs: bits of the layers' inputs; None: they stay float.
      tell: what prints of trainings that diverge.
    """

    def __init__(self, task, model, dataset, *, epochs, batch_size, seeds, inputs=None, tell=print):
        self.task, self.seeds, self.inputs = task, tuple(seeds), inputs
        self.batch_size, self.tell = batch_size, tell
        self._names = {"model": model, "dataset": dataset, "classes": task.dataset.classes}
        self.total = epochs * max(1, len(task.dataset.train[0]) // batch_size)
        self._predict = evaluation.make_predict(task)
        self._first = {}  # seed -> variables
        self._full = {}  # seed -> Outcome, in full precision

    def full_precision(self) -> Result:
        """Trains the networks that others start from; returns their row."""
        method, results = full_precision(self.total), []
        steps = engine.make_steps(self.task, method)
        for seed in self.seeds:
            began = time.monotonic()
            self._first[seed] = self.task.init(seed)
            label = self._label("full precision", seed)
            outcome = self._run(label, method, self.total, steps, self._first[seed], seed)
            self._full[seed] = outcome
            variables = _plain(outcome.variables)
            found = self._predict(variables, self.task.dataset.test)
            score = self.task.metric.of(found.score)
            file = self._file("float", 32, variables["params"], variables, score, seed)
            result = Result(
                method="float",
                title="full precision",
                bits=32,
                full_precision=score,
                quantized=score,
                nbytes=len(file),
                compression=1.0,
                weight_error=0.0,
                seconds=time.monotonic() - began,
                curve=self._curve(outcome),
                params=variables["params"],
                encoded=variables["params"],
                file=file,
                metric=self.task.metric,
                seed=seed,
                scores=self.task.metric.of_each(found),
            )
            self._float_bytes = len(file)
            results.append(result)
        return rows_lib.joined(results)

    def widths(self, name: str, asked) -> list[Callable[[], Result | None]]:
        """Returns, for every width of a method, what trains its row.

        It gives None where all seeds diverge, and a row of the others where some do.

        Args:
          name: of the method.
          asked: widths, or None.
        """
        entry, kept = methods.find(name), {}
        total = entry.steps(self.total)

        def row(bits):
            if not entry.shared:
                kept.clear()
            results = []
            for seed in self.seeds:
                settings = methods.settings_on(self._names["dataset"], name, bits)
                plan = methods.plan_of(name, bits, total, **settings)
                try:
                    results.append(self.result(name, entry, plan, bits, total, seed, kept))
                except FloatingPointError as error:
                    self.tell(f"{error}; it has no row")
            return rows_lib.joined(results) if results else None

        return [lambda bits=bits: row(bits) for bits in entry.chosen(asked)]

    def result(
        self,
        name: str,
        entry: methods.Entry,
        plan: Plan,
        bits: int,
        total: int,
        seed: int,
        kept: dict,
    ) -> Result:
        """Trains one seed of a row by a plan, encodes it, and returns how good it is.

        Args:
          kept: what is compiled, for other seeds, and widths where one program serves all.

        Raises:
          FloatingPointError: it diverges.
        """
        began = time.monotonic()
        outcome, inputs = self._full[seed], None
        if plan.method is not None:
            method = plan.method
            if self.inputs is not None and method.quantizer is not None:
                inputs = entry.inputs(self.inputs)
                method = method._replace(input_quantizer=inputs)
            if "steps" not in kept:
                kept["steps"] = engine.make_steps(self.task, method)
            start = self._first[seed]
            if entry.start == "trained":
                start = _plain(self._full[seed].variables)
            label = self._label(f"{entry.title}, {bits} bits", seed)
            outcome = self._run(label, method, total, kept["steps"], start, seed)
        floats = _plain(outcome.variables)
        if plan.deploy is None:
            shipped = deploy.deploy(floats, plan.method.quantizer, outcome.state)
        else:
            state = None if plan.trained is None else plan.trained(outcome.opt_state)
            shipped = deploy.deploy(floats, plan.deploy, state)
        variables = shipped.variables
        if self.inputs is not None:
            variables, inputs = self._with_inputs(variables, outcome, entry, inputs)
        if "predict" not in kept:
            kept["predict"] = (
                evaluation.make_predict(self.task, inputs) if inputs else self._predict
            )
        predict = kept["predict"]
        deployed = deploy.better_statistics(
            self.task, lambda variables, split: predict(variables, split).score, variables, inputs
        )
        found = predict(deployed, self.task.dataset.test)
        metric = self.task.metric
        score = metric.of(found.score)
        packed = self._file(name, shipped.bits, shipped.encoded, deployed, score, seed, inputs)
        return Result(
            method=name,
            title=entry.title,
            bits=shipped.bits,
            full_precision=metric.sign * outcome.final_score if entry.floats else float("nan"),
            quantized=score,
            nbytes=len(packed),
            compression=self._float_bytes / len(packed),
            weight_error=shipped.weight_error if entry.floats else float("nan"),
            seconds=time.monotonic() - began,
            curve=self._curve(outcome),
            params=floats["params"],
            encoded=shipped.encoded,
            file=packed,
            metric=metric,
            seed=seed,
            start=entry.start,
            inputs=self.inputs,
            note=entry.note,
            scores=metric.of_each(found),
        )

    def _with_inputs(self, variables, outcome, entry, inputs):
        """The network with quantized inputs, as trained or calibrated now, and their quantizer."""
        if inputs is not None:
            states = {name: outcome.variables.get(name, {}) for name in ("quant", "quant_stats")}
            return {**variables, **{k: v for k, v in states.items() if v}}, inputs
        inputs = entry.inputs(self.inputs)
        apply = engine.model_apply(self.task.model, inputs)
        x = self.task.inputs(self.task.dataset.train[0][:CALIBRATED_ON])
        return linen.calibrate(apply, variables, x, train=False), inputs

    def _label(self, told, seed):
        return told if len(self.seeds) == 1 else f"{told}, seed {seed}"

    def _run(self, label, method, total, steps, variables, seed) -> phases.Outcome:
        metric = self.task.metric

        def score(variables):
            found = self._predict(_plain(variables), self.task.dataset.test)
            return metric.sign * metric.of(found.score)

        return phases.run(
            self.task,
            [phases.Phase(label, method, total, steps)],
            variables,
            score,
            batch_size=self.batch_size,
            seed=seed,
            every=-(-total // POINTS),
        )

    def _file(
        self, method, bits, encoded, variables, score, seed, inputs: InputQuantizer | None = None
    ) -> bytes:
        """The file of a network, which `quantjax evaluate` reads with nothing beside it."""
        told = {**self._names, "method": method, "bits": bits, "seed": seed}
        told[self.task.metric.name] = score
        told |= {} if inputs is None else {"inputs": repr(inputs)}
        return storage.to_bytes({**variables, "params": encoded}, metadata=told)

    def _curve(self, outcome) -> tuple:
        sign = self.task.metric.sign
        return tuple((p.step, p.loss, sign * p.score) for p in outcome.history)


def _plain(variables: dict) -> dict:
    return {name: variables[name] for name in ("params", "batch_stats") if name in variables}
