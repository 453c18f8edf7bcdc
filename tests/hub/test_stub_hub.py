"""The loopback Hub against the unmodified client: what the hub tests rest on."""

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from stub_hub import StubHub, card_errors, git_blob_id


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # loopback only
    with StubHub() as hub:
        yield hub


def test_files_come_back_as_they_were_committed(hub, tmp_path):
    api = HfApi(endpoint=hub.url, token=hub.token)
    assert api.whoami()["orgs"][0]["name"] == "org"
    api.create_repo("org/model")
    weights = bytes(range(256)) * 1000
    operations = [CommitOperationAdd("model.safetensors", weights), CommitOperationAdd("sub/a.txt", b"hello")]
    commit = api.create_commit("org/model", operations, commit_message="first")
    info = api.model_info("org/model")
    assert info.sha == commit.oid
    assert {file.rfilename for file in info.siblings} == {".gitattributes", "model.safetensors", "sub/a.txt"}
    entries = {entry.path: entry for entry in api.list_repo_tree("org/model", recursive=True)}
    assert entries["model.safetensors"].size == 256_000
    assert entries["sub/a.txt"].blob_id == git_blob_id(b"hello")
    path = api.hf_hub_download("org/model", "model.safetensors", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == weights
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download("org/model", "absent.txt", cache_dir=tmp_path)


def test_an_old_commit_stays_readable_and_unchanged_files_make_no_commit(hub, tmp_path):
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("org/model")
    first = api.upload_file(path_or_fileobj=b"one", path_in_repo="a.txt", repo_id="org/model")
    api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="org/model")
    num_commits = len(hub.repositories["org/model"].commits)
    api.upload_file(path_or_fileobj=b"two", path_in_repo="a.txt", repo_id="org/model")
    assert len(hub.repositories["org/model"].commits) == num_commits
    old = api.hf_hub_download("org/model", "a.txt", revision=first.oid, cache_dir=tmp_path)
    with open(old, "rb") as file:
        assert file.read() == b"one"


def test_strangers_are_refused(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token=False).create_repo("org/model")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(endpoint=hub.url, token="hf_wrong").create_repo("org/model")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.url, token=hub.token).create_repo("other/model")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=hub.token).model_info("org/model")
    assert hub.repositories == {}


def test_card_errors_names_what_is_wrong():
    good = "---\nlicense: apache-2.0\ntags: [a, b]\n---\n# Title\n"
    assert card_errors(good) == []
    assert "no metadata block" in card_errors("# Title\n")[0]
    assert '"tags" must be a list of strings' in card_errors("---\ntags: [1]\n---\n")[0]
    index = "---\nmodel-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: {name: d}\n---\n"
    assert card_errors(index) == ['"model-index[].results[].dataset" needs "type" and "name"']
