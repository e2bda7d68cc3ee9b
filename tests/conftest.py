"""Shared set-up: quiet transformers, no network, one thread where several processes share the tests."""

import importlib.util
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers

pytest.register_assert_rewrite("support")
if importlib.util.find_spec("hypothesis") is not None:  # the environment of vLLM has none
    from hypothesis import settings

    # How long an example takes says how busy the machine is.
    settings.register_profile("tests", settings.default, deadline=None)
    settings.load_profile("tests")
# What a test starts is no worker: pytest-benchmark, for one, measures nothing in workers.
if os.environ.pop("PYTEST_XDIST_WORKER", None) is not None:
    torch.set_num_threads(1)  # there is a worker on every core

from support.drafts import Script  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, with warnings on, and with those that are given once given anew."""
    logging = transformers.logging
    type(logging.get_logger("gap_triton")).warning_once.cache_clear()
    logging.set_verbosity_warning()
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()
    logging.set_verbosity_error()


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch):
    """Make ``prompt_lookup_num_tokens`` follow a script instead."""

    def follow(answer: torch.Tensor, right: tuple[int, ...], wrong: int) -> type[Script]:
        Script.answer, Script.right, Script.wrong, Script.lengths = answer, right, wrong, []
        monkeypatch.setattr(
            transformers.generation.utils, "PromptLookupCandidateGenerator", Script, raising=True
        )
        return Script

    return follow
