"""The command `quantjax`: list, compare, run, results, inspect, evaluate, export."""

import os
import sys
from pathlib import Path
from typing import Annotated

from quantjax.lab import compilation_cache, interrupts


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit status; bad input gives one line, not a trace."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return interrupts.STATUS


def _main(arguments) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tyro
    except ImportError:
        print("quantjax: the command line needs the extra: pip install 'quantjax[lab]'")
        return 2
    from quantjax.encoded.export import PLATFORMS
    from quantjax.lab import artifacts, listing, recipes
    from quantjax.lab.compare import Settings, compare
    from quantjax.lab.report import records
    from quantjax.lab.train.options import Options

    compilation_cache.keep()
    positional = tyro.conf.Positional

    def run(
        experiment: Annotated[str, positional],
        context: Annotated[recipes.Context, tyro.conf.arg(name="")] = recipes.Context(),  # noqa: B008
        options: Annotated[Options, tyro.conf.arg(name="")] = Options(),  # noqa: B008
        out: Path = Path("quantjax-results"),
        record: bool = False,
    ):
        """Runs a recipe of experiments/ and writes its record.

        Args:
          experiment: name of a recipe, see `quantjax list`, or a path.
          out: folder of the record.
          record: write it where the repository keeps its own, into experiments/results.
        """
        folder = recipes.FOLDER / "results" if record else out
        print(f"record: {recipes.run(experiment, context, folder, options)}")

    def comparison(
        settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings(),  # noqa: B008
        options: Annotated[Options, tyro.conf.arg(name="")] = Options(),  # noqa: B008
    ):
        """Puts methods side by side on the same data and writes a report."""
        compare(settings, options)

    def listed(data_dir: Path | None = None):
        """Lists methods, models, data sets and recipes, each with a line.

        Args:
          data_dir: where prepared TFDS sets lie.
        """
        listing.show(data_dir)

    def table(write: Path | None = None, folder: Path | None = None):
        """Prints the table of recorded results.

        Args:
          write: a Markdown file whose sections of results and of the comparison are replaced.
          folder: of the records; experiments/results if not given.
        """
        records.show(write, recipes.FOLDER / "results" if folder is None else folder)

    def inspect(file: Annotated[Path, positional], plots: Path | None = None):
        """Prints what a saved network holds: leaves, sizes, coders, digests, metadata.

        Args:
          file: that qj.save has written.
          plots: folder for pictures of bits and weights by layer.
        """
        artifacts.inspect(file, plots)

    def evaluate(
        file: Annotated[Path, positional],
        dataset: str | None = None,
        model: str | None = None,
        data_dir: Path | None = None,
    ):
        """Prints how good a saved network is on test images or a test text.

        Args:
          file: that qj.save has written.
          dataset: digits, a TFDS set or a directory; what the file says if not given.
          model: as in compare; what the file says if not given.
          data_dir: where prepared TFDS sets lie.
        """
        artifacts.evaluate(file, dataset, model, data_dir, tell=print)

    def export(
        file: Annotated[Path, positional],
        out: Path,
        dataset: str | None = None,
        model: str | None = None,
        data_dir: Path | None = None,
        platforms: tuple[str, ...] = PLATFORMS,
        batch: int | None = None,
        pixels: bool = False,
    ):
        """Writes a saved network as a program that needs no quantjax: StableHLO or ONNX.

        Args:
          file: that qj.save has written.
          out: of the program; ONNX where it ends in .onnx.
          dataset: digits, a TFDS set or a directory; what the file says if not given.
          model: as in compare; what the file says if not given.
          data_dir: where prepared TFDS sets lie.
          platforms: that StableHLO runs on, of cpu, cuda, tpu, rocm.
          batch: images or windows at once; any number if not given.
          pixels: it takes uint8 images instead of normalised ones, or uint8 bytes.
        """
        artifacts.export(
            *(file, out, dataset, model, data_dir),
            platforms=platforms,
            batch=batch,
            pixels=pixels,
        )

    commands = {"list": listed, "compare": comparison, "run": run, "results": table}
    commands |= {"inspect": inspect, "evaluate": evaluate, "export": export}
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="quantjax",
            description="Neural networks of four bits and less. `quantjax list` shows what there "
            "is: methods, models, data sets, recipes.",
            args=arguments,
        )
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"quantjax: {error}", file=sys.stderr)
        return 2
    return 0
