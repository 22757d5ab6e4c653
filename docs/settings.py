"""Writes docs/settings.md from the code: `make docs`. tests/test_settings_page.py fails if the page is out of date."""

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

This page is generated from the code by `make docs`: change the code, not the page.

## Where a value comes from

The first of these that has a value wins: flag, environment, glad.yaml, default. `glad config show COMMAND` prints the
settings a command would run with, and where each value comes from.

- **Flag**: as listed below. `glad COMMAND --help` prints the same.
- **Environment**: `GLAD_COMMAND_OPTION`, such as `GLAD_SCORE_BATCH_SIZE=16` or
  `GLAD_BUNDLE_CREATE_PRESET=VisA/pcb1`; a flag without a value takes `true` or `false`.
- **glad.yaml**: in the folder where `glad` is called, or `glad --config FILE`. It has a section for each command, with
  the options without their dashes and the arguments by their names. An unknown section or key is an error that names
  the nearest known one.

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

Other environment variables:

| variable | what it does |
|---|---|
| `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | credentials for `s3://` |
| `AWS_PROFILE` | a profile with credentials; without both, AWS's default chain applies, such as the machine's role |
| `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL` | URL of an S3 server other than AWS |
| `AWS_CA_BUNDLE` | file with the certificate of an authority of your own that the S3 server's was signed by |
| `AWS_NO_SIGN_REQUEST` | `true`: read public buckets without credentials |
| `AWS_REQUEST_PAYER` | `requester`: agree to pay for requests to buckets whose owner does not |
| `AWS_REGION`, `AWS_DEFAULT_REGION` | the bucket's region; default with an endpoint: us-east-1 |
| `GLAD_CACHE` | folder for copies of bundles from `s3://`, one per machine; default: `~/.cache/glad` |
| `GLAD_CACHE_GB` | gigabytes for these copies, beyond which unused ones are deleted; default: half of the disk |
| `GLAD_NOTIFY_KEY` | key that signs the messages of `glad score --notify` |
| `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN_PATH` | of Ray, for a cluster with a token: `token`, and the file that holds it |
| `RAY_API_SERVER_ADDRESS` | URL of the dashboard that `glad submit` and `glad jobs` connect to |
| `MLFLOW_TRACKING_URI` | MLflow server to log training to as well, if mlflow is installed |

"""

BUNDLE = """\
## A bundle's settings

They are stored in the bundle's `glad.json` under `settings`; `glad bundle inspect BUNDLE` prints them.
`glad bundle create --preset` uses published values. `glad train` and `glad calibrate` set `start_step`,
`inference_steps`, `min_step`, `delta`, `profile`, `score_fall`, `score_guess` and `threshold`. Symbols are the paper's.

"""

RECIPE = """\
## A training recipe

The first of these that has a value wins: `glad retrain --settings` for a category, an option of `glad train` or `glad
retrain`, `provenance.recipe` in the base bundle's
`glad.json`, the default below. `--precision` sets `autocast`, `--ema` sets `ema_decay`, `--no-anomalies` sets
`anomaly_probability` to 0. `--part dino` and `--part vae` have recipes of their own instead of the base bundle's
(`PART_RECIPES` in `pipelines/train/plan.py`).

"""


def page() -> str:
    return HEAD + commands() + BUNDLE + table(Settings) + "\n" + RECIPE + table(Recipe)


def commands() -> str:
    """Typer's own page of all commands, its headings one level deeper, without usage lines and `--help`."""
    typer = [sys.executable, "-m", "typer", "pipelines.cli.app", "utils", "docs", "--name", "glad"]
    typer += ["--title", "Commands"]
    root = PAGE.parents[1]
    text = subprocess.run(typer, cwd=root, check=True, capture_output=True, text=True, encoding="utf-8").stdout
    text = html.unescape(text).replace("\r\n", "\n")
    text = re.sub(r"\*\*Usage\*\*:\n\n```console\n.*?```\n\n", "", text, flags=re.DOTALL)
    text = re.sub(r"\* `--help`: .*\n", "", text).replace("**Options**:\n\n\n", "")
    text = re.sub(r"^Example: (.*)$", r"    \1", text, flags=re.MULTILINE)
    return re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE).rstrip() + "\n\n"


def table(model: type[BaseModel]) -> str:
    """A Markdown table of a pydantic model's fields: name, default, accepted values, description."""
    lines = ["| setting | default | takes | what it is |", "|---|---|---|---|"]
    for name, field in model.model_json_schema()["properties"].items():
        default = field.get("default")
        shown = "none" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        lines.append(f"| `{name}` | {shown} | {takes(field)} | {field.get('description', '')} |")
    return "\n".join(lines) + "\n"


def takes(field: dict[str, Any]) -> str:
    """Accepted values of a field of a JSON schema: its type and range, or its choices."""
    (schema,) = [schema for schema in field.get("anyOf", [field]) if schema.get("type") != "null"]
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema]
    names = {"integer": "whole number", "object": "table", "boolean": "true, false"}
    return ", ".join([names.get(schema["type"], schema["type"]), *bounds])


if __name__ == "__main__":
    PAGE.write_text(page())
