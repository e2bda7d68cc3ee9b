"""The embedded models' held-out scenes as files of RefCOCO: what shows that readers and numbers are right."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from ..demo.scenes import held_out

# The hub's files ask for a caption; what is asked here are the expressions, which are its answers.
QUESTION = "Please carefully observe the area circled in the image and come up with a caption for the area."
VALUES = {"question_id": "string", "question": "string", "iscrowd": "int8", "file_name": "string"}
LISTS = {"answer": "string", "segmentation": "float32", "bbox": "float32"}


def write_refcoco(folder: Path, count: int, split: str = "val") -> Path:
    """Write held-out scenes as a parquet file with the columns of lmms-lab-encoder/RefCOCO.

    Args:
        folder: Becomes the folder of the data set; made if missing.
        count: Scenes, each with one expression, such as "the red triangle".
        split: Name of the split.

    Returns:
        The file.

    Raises:
        ImportError: Pyarrow is not installed.
    """
    import pyarrow as pa  # optional: in the extra "eval"
    import pyarrow.parquet as parquet

    scenes = held_out(count)
    rows = []
    for i in range(count):
        x0, y0, x1, y1 = map(float, scenes.target_boxes[i])
        file = io.BytesIO()
        scenes.image(i).save(file, format="PNG")
        rows.append(
            {
                "question_id": str(i),
                "image": {"bytes": file.getvalue(), "path": f"scene_{i}.png"},
                "question": QUESTION,
                "answer": [f"the {scenes.name(i)}"],
                "segmentation": [x0, y0, x1, y0, x1, y1, x0, y1],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "iscrowd": 0,
                "file_name": f"scene_{i}.png",
            }
        )
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {name: getattr(pa, dtype)() for name, dtype in VALUES.items()}
    lists = {name: pa.list_(getattr(pa, dtype)()) for name, dtype in LISTS.items()}
    schema = pa.schema({**types, **lists, "image": image}, {"huggingface": json.dumps(_hub_features())})
    path = folder / "data" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=100)
    return path


def _hub_features() -> dict[str, Any]:
    """What the library datasets writes into a parquet file, by which it knows images again."""

    def value(dtype: str) -> dict[str, str]:
        return {"dtype": dtype, "_type": "Value"}

    features: dict[str, Any] = {name: value(dtype) for name, dtype in VALUES.items()}
    features |= {name: {"feature": value(dtype), "_type": "Sequence"} for name, dtype in LISTS.items()}
    return {"info": {"features": {**features, "image": {"_type": "Image"}}}}
