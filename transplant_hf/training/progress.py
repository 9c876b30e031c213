"""The progress of a training on standard error."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..display import progress_bar

__all__ = ["StderrProgress"]


class StderrProgress(TrainerCallback):
    """A progress bar on standard error with the last loss; standard output is for results."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        quiet = self._quiet or not state.is_world_process_zero
        self._bar = progress_bar(state.max_steps, "Training", unit="step", quiet=quiet)
        self._bar.update(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the last loss."""
        if self._bar is not None and "loss" in (logs or {}):
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def close(self) -> None:
        """Close the bar, also after an error."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
