import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

CLUSTERS = sorted((Path(__file__).parent.parent / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_a_cluster_file_is_what_rays_launcher_takes(file: Path) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_no_checkout_lies_where_it_would_hide_the_installed_package(file: Path) -> None:
    mounts = yaml.safe_load(file.read_text())["file_mounts"]
    assert all(target.rstrip("/") not in ("~/raysv", "~/ray") for target in mounts)
