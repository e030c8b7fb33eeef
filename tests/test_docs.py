import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_configuration_reference_is_what_the_code_says() -> None:
    specification = importlib.util.spec_from_file_location("reference", DOCS / "make_config_reference.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (DOCS / "config.md").read_text(encoding="utf-8") == module.reference()
