"""Writes the table of model types into docs/models.md: ``python docs/models.py``, with the newest supported transformers.

Every type is built, tiny, as the tests build it. Its decoder's traits and the sentence of a refusal are read from it, and
what is tested of it from the tables that the tests run over, so the document can't say more than they do.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support import families, model_types, tiny  # noqa: E402
from support.oracle import core_of  # noqa: E402

from gap_triton.integration.supported_models import find_parts, why_not_in_decoder  # noqa: E402
from gap_triton.introspect import TOKEN_ID_FIELDS  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
PLACE = re.compile(r"(<!-- model types -->\n).*?(<!-- end of model types -->)", re.DOTALL)
HEADER = (
    "| model type | position ids | exact | placeholder | tested besides, or why not |\n|---|---|---|---|---|"
)
BOTH, SOME, BEFORE = "before and in the decoder", "before the decoder, at some layers", "before the decoder"
# What the tests do with some exact types, next to what they do with all.
MORE_TESTS = {
    "vision tower": (*model_types.IMAGES, *model_types.IMAGES_BEFORE, *tiny.CLASSES),
    "video": model_types.VIDEOS,
    "ids on several axes": model_types.SEVERAL_AXES,
    "deepstack": model_types.DEEPSTACK,
    "several turns": model_types.SEVERAL_TURNS,
    "static cache": model_types.STATIC_CACHE,
    "`inputs_embeds`": model_types.EMBEDDINGS,
}


def with_table(text: str) -> str:
    """``text`` of the document with its table made anew."""
    types = sorted(
        (
            *model_types.EXACT,
            *model_types.ALONE,
            *model_types.NOT_PLAIN,
            *model_types.REFUSED,
            *model_types.NOT_BUILT,
        )
    )
    rows = [row for name in types if name in families.TYPES for row in (_row(name),)]
    plain, more = len(model_types.EXACT) + len(model_types.ALONE), len(model_types.NOT_PLAIN)
    at_some = len(model_types.PRUNING_LAYERS)
    summary = (
        f"{plain + more} types are exact: {plain} of them before the decoder and at all of its layers, {at_some} before it "
        f"and at some layers, and {more - at_some} before it only. {len(model_types.REFUSED)} are refused, of the "
        f"{len(rows)} that transformers {model_types.NEWEST} lists."
    )
    published = [
        f"| [{name}](published.md) | 1-D RoPE | {BOTH}, in gap_triton.models | `visual_mask` | vision tower, loading |"
        for name in model_types.PUBLISHED
    ]
    table = "\n".join([summary, "", HEADER, *rows, *published])
    return PLACE.sub(lambda place: f"{place[1]}{table}\n{place[2]}", text)


def _row(name: str) -> str:
    if name in model_types.NOT_BUILT:
        return f"| {name} | | not tested | | {model_types.NOT_BUILT[name]} |"
    model = families.build(name)
    if name in model_types.REFUSED:
        return f"| {name} | | refused | | {_reason(model)} |"
    if name in model_types.ALONE:
        find_parts(model)
        return f"| {name} | 1-D RoPE | {BOTH}, as a decoder alone | `visual_mask` | |"
    owner, text = core_of(model)
    more = ", ".join(test for test, names in MORE_TESTS.items() if name in names)
    status = SOME if name in model_types.PRUNING_LAYERS else BEFORE if name in model_types.NOT_PLAIN else BOTH
    if name in model_types.TEXT_CONFIG_ONLY:
        status += ', loaded with `{"text_config": "gap_triton"}`'
    if name in model_types.OWN_ATTENTION:
        status += ", by `attach`"
    if name in model_types.NOT_PLAIN:
        where = "at every layer" if name in model_types.PRUNING_LAYERS else "in the decoder"
        more = "; ".join(filter(None, (more, f"not {where}: {why_not_in_decoder(text)}")))
    return f"| {name} | {_position_ids(owner, text)} | {status} | {_placeholders(model.config)} | {more} |"


def _reason(model: object) -> str:
    try:
        find_parts(model)  # type: ignore[arg-type]
    except ValueError as refusal:
        sentence = str(refusal).split(". Load it")[0]
        sentence = re.sub(r"found no (.*) in \S+ \(model_type=\S+\):", r"no \1 found:", sentence)
        return re.sub(r"^gap_triton (can't prune \S+ \(model_type=\S+\): )?", "", sentence)
    raise RuntimeError(f"{type(model).__name__} is listed as refused, and is not")


def _position_ids(owner: object, text: object) -> str:
    rotary = getattr(text, "rotary_emb", None)
    if rotary is None:
        return "no RoPE"
    traits = ["M-RoPE" if hasattr(owner, "get_rope_index") else "1-D RoPE"]
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        traits.append("by layer type")
    if getattr(text.config, "sliding_window", None):  # type: ignore[attr-defined]
        traits.append("sliding layers")
    return ", ".join(traits)


def _placeholders(config: object) -> str:
    by_token: dict[int, str] = {}
    for field in TOKEN_ID_FIELDS:
        token = getattr(config, field, None)
        if isinstance(token, int):
            by_token.setdefault(token, f"`{field}`")
    return ", ".join(by_token.values())


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")
