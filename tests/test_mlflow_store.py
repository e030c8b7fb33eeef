from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_fixtures import BASE, RESOURCES, mlflow_warnings, new_driver, runs, tell, trial

from raysv.search import mlflow_store

pytestmark = mlflow_warnings


def test_the_configuration_of_a_run_comes_back_with_every_digit(tracking_uri: str) -> None:
    tell(new_driver(tracking_uri), "on_trial_start", trial(**{"loss.margin": 0.123456789}))
    tree = mlflow_store.config_of_run(runs(tracking_uri)[0].info.run_id, tracking_uri)
    assert tree == BASE | {"loss": {"margin": 0.123456789, "scale": 30.0}, "resources": RESOURCES}


def test_an_unknown_run_is_an_error_that_names_it(tracking_uri: str) -> None:
    with pytest.raises(ValueError, match="No configuration of a run 0123"):
        mlflow_store.config_of_run("0123", tracking_uri)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "file:///tmp/mlruns", "nonsense://x"])
def test_an_address_without_mlflow_is_an_error_that_names_it(address: str) -> None:
    with pytest.raises(ValueError, match=f"MLflow cannot be used at {address}: "):
        mlflow_store.check(address)


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:hidden@mlflow.example/",
        "https://hidden@mlflow.example/",
        "https://mlflow.example/?token=hidden",
        "https://me:hid@den@mlflow.example/",
        "postgresql://me:hidden@db.example/mlflow",
        "postgresql://db.example/mlflow?user=me&password=hidden",
        "mysql+pymysql://db.example/mlflow?ssl_key_passwd=hidden&charset=utf8",
    ],
)
def test_an_address_with_a_secret_is_refused_and_the_secret_not_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        mlflow_store.check(uri)
    assert not any(part in str(caught.value) for part in ("hidden", "hid@", "den@"))


@pytest.mark.parametrize(
    "uri", ["postgresql://me@db.example/mlflow?passfile=x", "sqlite:////a:b@c/mlflow.db", "http://127.0.0.1:5000"]
)
def test_an_address_without_a_secret_is_told_as_it_is(uri: str) -> None:
    assert mlflow_store._without_secrets(uri) == uri


def test_a_new_database_is_made_whole_beside_no_remains(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    mlflow_store.check(uri)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["mlflow.db"]
    experiment = mlflow_store.experiment_id(uri, "raysv")
    mlflow_store.check(uri)
    assert mlflow_store.experiment_id(uri, "raysv") == experiment


def test_the_default_is_a_file_in_the_folder_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert mlflow_store.default_tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert mlflow_store.default_tracking_uri(tmp_path / "study") == f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    assert mlflow_store.default_tracking_uri(tmp_path) == "http://mlflow.example"


def test_a_deleted_experiment_is_an_error_that_says_how_to_restore_it(tracking_uri: str) -> None:
    MlflowClient(tracking_uri).delete_experiment(mlflow_store.experiment_id(tracking_uri, "raysv"))
    with pytest.raises(ValueError, match=r"raysv at .* was deleted.*mlflow experiments restore"):
        mlflow_store.experiment_id(tracking_uri, "raysv")


def test_the_link_opens_the_trials_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "experiment_id", lambda uri, name: {"raysv": "7"}[name])
    link = mlflow_store.runs_link("http://host:5000/", "raysv", "mine")
    assert link.startswith("http://host:5000/#/experiments/7/runs?workflowType=machine_learning&orderByKey=metrics.%60")
    assert link.endswith(
        "searchFilter=tags.%60raysv.kind%60%20%3D%20'trial'%20AND%20tags.%60raysv.study%60%20%3D%20'mine'"
    )


def test_the_link_for_a_file_is_where_a_server_beside_it_listens(tracking_uri: str) -> None:
    number = mlflow_store.experiment_id(tracking_uri, "raysv")
    assert mlflow_store.runs_link(tracking_uri, "raysv", "mine").startswith(
        f"http://127.0.0.1:5000/#/experiments/{number}/runs?"
    )


def test_the_link_is_the_front_page_where_mlflow_cannot_be_asked(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert mlflow_store.runs_link("http://127.0.0.1:9/", "raysv", "mine") == "http://127.0.0.1:9"
    MlflowClient(tracking_uri).delete_experiment(mlflow_store.experiment_id(tracking_uri, "raysv"))
    assert mlflow_store.runs_link(tracking_uri, "raysv", "mine") == "http://127.0.0.1:5000"


def test_runs_are_found_by_all_their_tags_on_any_number_of_pages(tracking_uri: str) -> None:
    client = mlflow_store.connect(tracking_uri)
    experiment = mlflow_store.experiment_id(tracking_uri, "it's")
    made = [
        client.create_run(experiment, start_time=number, tags={"study": study, "kind": "trial"}).info.run_id
        for number, study in enumerate(["a", "it's", "a"], 1)
    ]
    whole = client.search_runs

    def page_by_page(*args: Any, **options: Any) -> Any:
        return whole(*args, **(options | {"max_results": 1}))

    client.search_runs = page_by_page

    def found(**tags: str) -> list[str]:
        return [run.info.run_id for run in mlflow_store.search_runs(client, experiment, tags)]

    assert found(kind="trial") == made
    assert found(kind="trial", study="a") == [made[0], made[2]]
    assert found(study="it's") == [made[1]]
    assert found(study="b") == []
