"""Write docs/config.md from the configuration's own fields: python docs/make_config_reference.py"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from raysv.config import Config
from raysv.search.space import RANGES, ResourcesConfig, SearchConfig

TARGET = Path(__file__).with_name("config.md")
INTRODUCTION = f"""# Configuration reference

Made from the code by `python docs/make_config_reference.py`; a test keeps it true.

A configuration is a YAML file of these sections; what a file leaves out has its default. In a search space any value
that is a text or a number, but `training.epochs`, may be left open:
{", ".join(f"`{kind}`" for kind in RANGES)}.

```yaml
loss: {{margin: {{uniform: [0.1, 0.5]}}, temperature: {{loguniform: [0.03, 0.3]}}, aam_views: {{choice: [all, first]}}}}
batch: {{utterances_per_speaker: {{int: [2, 4]}}}}
```

A range may depend on choices: `{{loguniform: [0.03, 0.3], when: {{loss.kind: [aam_supcon, supcon]}}}}` is searched only
where the trial's `loss.kind` is one of these, and the key keeps its default elsewhere.

`--set loss.margin=0.3` sets one value from the command line, `--set 'loss.margin={{uniform: [0, 0.3]}}'` opens one.
`${{NAME}}` in a text is replaced from the environment. Lists of `data` are looked up below `data.root`.
"""


def reference() -> str:
    """All sections as Markdown tables."""
    sections = {item.name: item.default_factory for item in dataclasses.fields(Config)}
    sections |= {"search": SearchConfig, "resources": ResourcesConfig}
    return "\n".join([INTRODUCTION, *(_section(name, cls) for name, cls in sections.items())])


def _section(name: str, cls: Any) -> str:
    rows = [
        f"## {name}",
        "",
        cls.__doc__.strip().splitlines()[0],
        "",
        "| key | default | may be | meaning |",
        "|---|---|---|---|",
    ]
    for item in dataclasses.fields(cls):
        default = item.default if item.default is not dataclasses.MISSING else item.default_factory()
        rows.append(f"| `{item.name}` | `{default!r}` | {_allowed(item.metadata)} | {item.metadata['doc']} |")
    return "\n".join([*rows, ""])


def _allowed(limits: Any) -> str:
    if limits["choices"]:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    if limits["above"] > -math.inf:
        return f"above {limits['above']:g}"
    if limits["low"] > -math.inf:
        return (
            f"{limits['low']:g} to {limits['high']:g}" if limits["high"] < math.inf else f"at least {limits['low']:g}"
        )
    return ""


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
