"""What k8s/components/web-identity gives a container is what boto3 needs; a stand-in takes STS' place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import boto3
import pytest
from manifests import RECIPE, option, pod_spec, pods, variables, volumes
from services.aws_variables import AWS_VARIABLES

from launch.manifest import render

ROLE = "arn:aws:iam::123456789012:role/trainer"
ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>temporary</AccessKeyId>
<SecretAccessKey>secret</SecretAccessKey><SessionToken>session</SessionToken>
<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


@pytest.fixture
def asked() -> Iterator[tuple[str, list[dict[str, list[str]]]]]:
    """The address of what answers as STS, and what it was asked."""
    requests: list[dict[str, list[str]]] = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode()))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(ANSWER.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("flavour", ["job", "jobset", "trainjob"])
def test_boto3_exchanges_the_accounts_token_for_credentials(
    flavour: str,
    asked: tuple[str, list[dict[str, list[str]]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endpoint, requests = asked
    given = {"AWS_ENDPOINT_URL_STS": endpoint, "AWS_DEFAULT_REGION": "eu-central-1"}
    documents = render(pods(variables=given), recipe=RECIPE, flavour=flavour, role_arn=ROLE)
    values = variables(documents)

    # As the kubelet makes it: the token lies where the volume is mounted, and nowhere the API server's.
    token_file = values["AWS_WEB_IDENTITY_TOKEN_FILE"]
    folder, _, name = token_file.rpartition("/")
    volume = volumes(documents)[folder]
    [source] = volume["projected"]["sources"]
    assert volume["readOnly"] is True
    assert source["serviceAccountToken"]["path"] == name
    assert source["serviceAccountToken"]["audience"] == "sts.amazonaws.com"
    assert pod_spec(documents)["automountServiceAccountToken"] is False
    assert not option(documents, "run_dir").startswith(folder)
    (tmp_path / name).write_text("the account's token")

    for variable in (*AWS_VARIABLES, "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in values.items():
        if variable.startswith("AWS_"):
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / name))
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    credentials = boto3.Session().get_credentials()
    assert credentials is not None
    assert credentials.get_frozen_credentials().access_key == "temporary"
    [request] = requests
    assert request["Action"] == ["AssumeRoleWithWebIdentity"]
    assert request["RoleArn"] == [ROLE]
    assert request["WebIdentityToken"] == ["the account's token"]
