"""report_to: TensorBoard where it is installed, others by name, and refusals before anything loads."""

from __future__ import annotations

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
