"""Runs one step, and says in lines of JSON what it finds and how it ends."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from bench.outcome import FAILED, PASSED, SKIPPED, Found, NotAvailable, StepFailed
from bench.own_steps import MARK
from bench.steps import STEPS
from bench.steps.settings import Settings, settings_for
from bench.words import first_line

STACKS_S = 5.0
"""Seconds before the limit at which a step that hangs says where."""

Step = Callable[[Settings], Iterator[Found]]


def say(**entry: object) -> None:
    """Print a line that the check reads."""
    print(MARK + json.dumps(entry), flush=True)


def attempt(name: str, settings: Settings) -> None:
    """Run a step; whatever it raises, even as it is imported, is how it ends."""
    try:
        module, _, function = STEPS[name].partition(":")
        step: Step = getattr(importlib.import_module(f"bench.steps.{module}"), function)
        for found in step(settings):
            say(found=found)
    except NotAvailable as error:
        say(status=SKIPPED, message=str(error))
    except StepFailed as error:
        say(status=FAILED, message=str(error))
    except BaseException as error:
        traceback.print_exc()
        say(status=FAILED, message=first_line(error))
    else:
        say(status=PASSED, message="")


def main() -> None:
    """Read the arguments and run the step that they name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds")
    parser.add_argument("--relaunches", type=int)
    given = parser.parse_args()
    faulthandler.dump_traceback_later(max(given.limit - STACKS_S, 1))
    settings = settings_for(given.device)
    if given.relaunches is not None:
        settings = replace(settings, relaunches=given.relaunches)
    attempt(given.name, settings)


if __name__ == "__main__":
    main()
