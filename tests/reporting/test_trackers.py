"""report_to: TensorBoard where it is installed, others by name, and refusals before anything loads."""

from __future__ import annotations

from typing import Any

import pytest

from parallel_tune import trackers
from parallel_tune.config import TrainConfig, make_config
from strategies.errors import ConfigError


@pytest.mark.parametrize(("installed", "chosen"), [(True, ["tensorboard"]), (False, [])])
def test_auto_is_tensorboard_where_it_is_installed(
    installed: bool, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: object() if installed and name == "tensorboard" else None)
    assert TrainConfig().report_to == ["auto"]
    assert trackers.chosen(["auto"]) == chosen
    trackers.check_installed(["auto"])


def test_none_and_names() -> None:
    assert trackers.chosen(["none"]) == []
    assert trackers.chosen([]) == []
    assert trackers.chosen(["wandb", "mlflow"]) == ["wandb", "mlflow"]


def test_an_unknown_tracker_is_refused_with_a_near_name() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"report_to": "wnadb"})
    assert caught.value.hint == "Did you mean wandb?"


def test_none_stands_alone() -> None:
    with pytest.raises(ConfigError, match="none stands alone"):
        make_config({"report_to": "none,wandb"})


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package tensorboard is not installed"):
        trackers.check_installed(["tensorboard"])


def test_names_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(trackers.PACKAGES) == set(INTEGRATION_TO_CALLBACK)


def test_a_tracker_that_fails_in_the_middle_of_a_run_does_not_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.integrations import NeptuneCallback

    class FullDisk(NeptuneCallback):  # type: ignore[misc]
        __module__ = NeptuneCallback.__module__

        def __init__(self) -> None:
            self.calls = 0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        def on_log(self, *_: Any, **__: Any) -> None:
            self.calls += 1
            raise OSError(28, "No space left on device")

        def __del__(self) -> None:
            pass

    tracker = FullDisk()
    trackers.keep_from_ending_the_run([tracker])
    tracker.on_log()
    tracker.on_log()
    assert tracker.calls == 1
    assert "FullDisk reports no more: OSError: [Errno 28] No space left on device" in capsys.readouterr().out
    with pytest.raises(OSError, match="No space"):
        tracker.on_train_begin()  # nothing is lost yet: better to hear of it
