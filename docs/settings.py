"""Writes docs/settings.md from the code: `make docs`. tests/test_settings_page.py holds the page to what this makes."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from glad_core.bundle.settings import Settings
from glad_core.training.recipe import Recipe

PAGE = Path(__file__).with_name("settings.md")

HEAD = """\
# Settings

Made from the code by `make docs`; change it there, not here.

## Where a value comes from

A flag wins over the environment, that over glad.yaml, that over the default. `glad config show COMMAND` prints what a
command would be run with and where each value comes from.

- **Flag**: as listed below. `glad COMMAND --help` prints the same.
- **Environment**: `GLAD_COMMAND_OPTION`, such as `GLAD_SCORE_BATCH_SIZE=16` or
  `GLAD_BUNDLE_CREATE_PRESET=VisA/pcb1`; a flag without a value takes `true` or `false`.
- **glad.yaml**: in the folder where `glad` is called, or `glad --config FILE`. A section for each command, in it the
  options without their dashes, and the arguments by their names. An unknown section or key is refused, with the nearest
  known one.

```yaml
score:
  model: s3://models/board
  out: s3://verdicts/monday
  batch-size: 16
  reconstructions: true
bundle:
  create:
    preset: MVTec-AD/screw
```

Other variables of the environment:

| variable | what it does |
|---|---|
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | keys for `s3://` |
| `AWS_PROFILE` | a profile instead; without either AWS's default chain, such as the machine's role |
| `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` | another S3 server than AWS |
| `AWS_REGION`, `AWS_DEFAULT_REGION` | the bucket's region; us-east-1 where an endpoint is given |
| `GLAD_CACHE` | where bundles from `s3://` are kept, `~/.cache/glad` by default |
| `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN_PATH` | Ray's own: `token` and the file with it, for a cluster that asks for one |
| `RAY_API_SERVER_ADDRESS` | the dashboard that `glad submit` and `glad jobs` speak to |
| `MLFLOW_TRACKING_URI` | where training is logged as well, if mlflow is installed |

"""

BUNDLE = """\
## A bundle's settings

In a bundle's `glad.json` under `settings`; `glad bundle inspect BUNDLE` prints them. `glad bundle create --preset`
takes the published ones, `glad train` and `glad calibrate` set T, δ, min_step, the threshold and the bounds of the
guarded search. Symbols are the paper's.

"""

RECIPE = """\
## A training recipe

Options of `glad train` win over the `recipe` in the provenance of its `--base`, that over these defaults. `--precision`
is `autocast`, `--ema` is `ema_decay`, `--no-anomalies` sets `anomaly_probability` to 0. `--part dino` and `--part vae`
start from recipes of their own (`PART_RECIPES` in `pipelines/train/job.py`).

"""


def page() -> str:
    return HEAD + commands() + BUNDLE + table(Settings) + "\n" + RECIPE + table(Recipe)


def commands() -> str:
    """What typer writes of every command, a level deeper and without what each of them repeats."""
    typer = [sys.executable, "-m", "typer", "pipelines.cli.main", "utils", "docs", "--name", "glad"]
    typer += ["--title", "Commands"]
    root = PAGE.parents[1]
    text = subprocess.run(typer, cwd=root, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    text = html.unescape(text).replace("\r\n", "\n")
    text = re.sub(r"\*\*Usage\*\*:\n\n```console\n.*?```\n\n", "", text, flags=re.DOTALL)
    text = re.sub(r"\* `--help`: .*\n", "", text).replace("**Options**:\n\n\n", "")
    text = re.sub(r"^Example: (.*)$", r"    \1", text, flags=re.MULTILINE)
    return re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE).rstrip() + "\n\n"


def table(model: type[BaseModel]) -> str:
    """A pydantic model's fields: name, default, what it takes, description."""
    lines = ["| setting | default | takes | what it is |", "|---|---|---|---|"]
    for name, field in model.model_json_schema()["properties"].items():
        default = field.get("default")
        shown = "none" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        lines.append(f"| `{name}` | {shown} | {takes(field)} | {field.get('description', '')} |")
    return "\n".join(lines) + "\n"


def takes(field: dict[str, Any]) -> str:
    """Kind and range of a field of a JSON schema."""
    kinds = [kind for kind in field.get("anyOf", [field]) if kind.get("type") != "null"]
    (kind,) = kinds
    if "enum" in kind:
        return ", ".join(f"`{value}`" for value in kind["enum"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {kind[bound]:g}" for bound, sign in signs.items() if bound in kind]
    names = {"integer": "whole number", "object": "table", "boolean": "true, false"}
    return ", ".join([names.get(kind["type"], kind["type"]), *bounds])


if __name__ == "__main__":
    PAGE.write_text(page())
