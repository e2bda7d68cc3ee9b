"""Rivals of `gap-triton bench --rivals`, played by packages of the same names: the real ones are installed nowhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from support import tiny
from support.command_line import cli, said
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gap_triton import GapConfig
from gap_triton.latency import Subject, Variant, variants_of
from gap_triton.latency.rivals import RIVALS, rivals_of

KVPRESS = """
import contextlib
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

for name, function in list(ALL_ATTENTION_FUNCTIONS.items()):
    ALL_ATTENTION_FUNCTIONS[name] = lambda *args, **kwargs: 1 / 0

class KnormPress:
    def __init__(self, compression_ratio):
        self.compression_ratio = compression_ratio

    @contextlib.contextmanager
    def __call__(self, model):
        def cut(module, args, kwargs, output):
            cache = kwargs.get("past_key_values", kwargs.get("cache"))
            layer = cache.layers[module.layer_idx]
            left = int(layer.keys.shape[2] * (1 - self.compression_ratio))
            layer.keys, layer.values = layer.keys[:, :, :left], layer.values[:, :, :left]

        layers = model.model.language_model.layers
        hooks = [layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in layers]
        yield
        for hook in hooks:
            hook.remove()
"""
SPARSEVLM = """
def apply_sparsevlm(model, n_vis, min_keep):
    print("registered")
    return {{"n_vis": n_vis, "resets": 0}}

def reset_n_vis(state, n_vis):
    {body}
"""

Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a module on the path, in place of whatever has its name; the others can't be imported."""
    for name in RIVALS:
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.syspath_prepend(tmp_path)

    def put(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name)

    return put


def ran() -> tuple[Subject, dict[str, Variant]]:
    inputs = tiny.prompt("llava", images=[[tiny.Image()]], before=[3], after=[6])
    subject = Subject("tiny", tiny.build("llava"), inputs, tiny.GRID**2)
    made = {each.name: each for each in variants_of(subject, GapConfig(0.4, 1), steps=4)}
    made["pruned"].prefill()
    return subject, made


def test_what_is_not_installed_is_absent(install: Install) -> None:
    made, absent = rivals_of(*ran())
    assert made == []
    assert list(absent) == ["kvpress", "sparsevlm"]
    assert all(why.startswith("not installed here (") for why in absent.values())


def test_kvpress_drops_as_many_rows_in_every_layer(install: Install) -> None:
    """And its import leaves the attention of all others alone."""
    install("kvpress", KVPRESS)
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    subject, variants = ran()
    (made,), absent = rivals_of(subject, variants)
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before
    assert list(absent) == ["sparsevlm"]
    made.prefill()
    ours = variants["pruned"].cache.layers[-1].keys.shape[2]
    assert made.name == "kvpress"
    for layer in made.cache.layers:
        assert ours - 1 <= layer.keys.shape[2] <= ours  # it rounds a share of the prompt down
    assert made.kv_bytes() < variants["pruned"].kv_bytes()
    made.decode()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("state['resets'] += 1", "drops nothing of this prompt"),
        ("raise KeyError('cache_position')", "fails: KeyError: 'cache_position'"),
    ],
)
def test_what_drops_nothing_or_fails_is_absent(
    body: str, why: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("sparsevlm", SPARSEVLM.format(body=body))
    made, absent = rivals_of(*ran())
    assert made == []
    assert absent["sparsevlm"] == f"sparsevlm with transformers {transformers.__version__} {why}"
    assert "registered" not in capsys.readouterr().out


def test_the_command_says_who_is_absent(tmp_path: Path, install: Install) -> None:
    install("kvpress", KVPRESS)
    path = tmp_path / "r.json"
    result = cli(
        "bench", "--model", "embedded", "--keep", "0.25", "--rivals",
        "--rounds", "2", "--output-len", "2", "--json", str(path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert [row["variant"] for row in report["rows"]] == ["sdpa", "attached", "pruned", "oracle", "kvpress"]
    assert list(report["absent"]) == ["sparsevlm"]
    assert "sparsevlm is not in the table: not installed here" in said(result)
