"""Log a run to TensorBoard: event files in RUN/tensorboard. Imported by the tracker's thread."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from distlora.system.exit_codes import DONE, STOPPED
from distlora.training.trackers.background import Client, TrackerStart


class TrackerRun(Client):
    """Event files of one start. TensorBoard drops the steps that a resume repeats (purge_step)."""

    def __init__(self, start: TrackerStart) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from torch.utils.tensorboard import SummaryWriter

        folder = start.run_dir / "tensorboard"
        self.place = f"{folder}; show it with `tensorboard --logdir {start.run_dir.parent}`"
        repeated_from = start.start_step + 1 if start.start_step > 0 else 0
        self._writer = cast(Any, SummaryWriter(str(folder), purge_step=repeated_from))
        parameters = {name: "null" if value is None else value for name, value in start.parameters().items()}
        self._writer.file_writer.add_summary(hparams_pb(parameters, trial_id=start.run_dir.name))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write one scalar per metric."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def log_table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write the rows as text, a Markdown table."""
        cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
        lines = [f"| {' | '.join(row)} |" for row in (list(columns), ["---"] * len(columns), *cells)]
        self._writer.add_text(name, "\n".join(lines), step)

    def close(self, exit_code: int) -> None:
        """Write the status of a run that will not be resumed, and close the file."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        if exit_code != STOPPED:
            status = api_pb2.STATUS_SUCCESS if exit_code == DONE else api_pb2.STATUS_FAILURE
            data = HParamsPluginData(session_end_info=SessionEndInfo(status=status))
            described = metadata.create_summary_metadata(data)
            ended = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=described, tensor=metadata.NULL_TENSOR)
            self._writer.file_writer.add_summary(Summary(value=[ended]))
        self._writer.close()
