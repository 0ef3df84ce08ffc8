"""`distlora data preview|row|prepare`: show what a run would be trained on, show what it was, tokenize its data.

The settings of the preview are composed, and the model and the data checked, as for `distlora train`. The functions
behind the commands import transformers, so each is imported when it is called.
"""

import dataclasses
from dataclasses import dataclass, field

from distlora.config import require
from distlora.config.file import load_config
from distlora_launcher.compose.checks import check_data, check_model_folder
from distlora_launcher.compose.compose import compose_config, expand_home
from distlora_launcher.compose.hub import with_small_files
from distlora_launcher.importing.settings_file import with_file
from distlora_launcher.terminal.arguments import read, subject

ACTIONS = {
    "preview": "print documents as the model sees them, and statistics of the data",
    "row": "print packed training sequences of a run by their numbers",
    "prepare": "tokenize the data of a run again if its cache entry is gone or damaged",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewArguments:
    """Print documents as the model sees them, with the trained tokens in green.

    Without colors (in a pipe, with NO_COLOR or --no-color) the trained tokens stand between [[ and ]]. Statistics
    follow: lengths, documents that are too long, documents left out with the reason, proportions of a mixture, padding.

    example: distlora data preview model.path=MODEL data.path=chats.jsonl
    """

    settings: list[str] = field(default_factory=list)
    """FILE.yaml|setting=value: settings of `distlora train`: model.path=FOLDER data.path=FILE ..."""
    rows: int = 2
    """N: number of documents per source to print."""
    all: bool = False
    """Read all documents (default: the first 1,000 per source)."""
    no_color: bool = False
    """Mark trained tokens with [[ ]] instead of a color."""
    html: str | None = None
    """FILE: write the documents also to an HTML page that shows their images."""
    config_dir: str | None = None
    """FOLDER: folder with your own recipes and config groups, as for `distlora train`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowArguments:
    """Print packed training sequences of a run by their numbers, as log messages name them.

    example: distlora data row runs/first 17 18
    """

    run: str
    """RUN: folder of a run."""
    numbers: list[int]
    """N: number of a sequence."""
    no_color: bool = False
    """Mark trained tokens with [[ ]] instead of a color."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareArguments:
    """Tokenize the data of a run again if its cache entry is gone or damaged.

    example: distlora data prepare runs/first
    """

    run: str
    """RUN: folder of a run."""


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names and return its exit code."""
    action = subject("data", arguments, ACTIONS)
    from distlora.architecture.tokens import tokenize_alone

    tokenize_alone()
    program, rest = f"distlora data {action}", arguments[1:]
    if action == "preview":
        return preview_documents(read(PreviewArguments, program, [expand_home(word) for word in rest]))
    if action == "row":
        return show_packed_rows(read(RowArguments, program, rest))
    run = read(PrepareArguments, program, rest).run
    load_config(run)
    from distlora.data.prepare import prepare_and_print

    return prepare_and_print(run)


def preview_documents(options: PreviewArguments) -> int:
    """Check the settings and print the preview. Returns the exit code."""
    require(options.rows >= 0, f"--rows={options.rows} is not a valid number of documents; write 0 or more")
    settings = with_file(options.settings, "distlora data preview", config_dir=options.config_dir)
    config = compose_config(settings, config_dir=options.config_dir)
    from distlora.data.preview import preview

    with with_small_files(config.model) as model:
        spec = dataclasses.replace(config.spec, model=model)
        check_model_folder(spec, config.data.sequence_length)  # Weights are not needed.
        check_data(config.data, config.train.objective, config.run_dir)
        return preview(
            model,
            config.prepared_data,
            config.train,
            documents=options.rows,
            read_all=options.all,
            no_color=options.no_color,
            html=options.html,
        )


def show_packed_rows(options: RowArguments) -> int:
    """Print packed sequences of a run. Returns the exit code."""
    load_config(options.run)
    from distlora.data.preview import show_rows

    return show_rows(options.run, options.numbers, no_color=options.no_color)
