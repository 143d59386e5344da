"""The files in examples/serve: well formed, with options that there are, and of files that are there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from lowtide.cli.app import app
from lowtide.sizes import parse_bytes

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "serve"
OPTIONS = {name for option in get_command(app).commands["serve"].params for name in option.opts}
DOCKERFILES = [FOLDER / "Dockerfile.cpu", FOLDER / "Dockerfile.cuda"]


def unit():
    parser = configparser.RawConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read(FOLDER / "lowtide.service")
    return parser


def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def words(name, file):
    """Those of an ENTRYPOINT or a CMD."""
    return json.loads(re.findall(rf"^{name} (\[.*\])$", file.read_text(), re.MULTILINE)[0])


def value(command, option):
    return command[command.index(option) + 1]


def test_options_are_there():
    commands = [shlex.split(unit()["Service"]["ExecStart"]), compose()["services"]["lowtide"]["command"]]
    commands += [words(name, file) for file in DOCKERFILES for name in ("ENTRYPOINT", "CMD")]
    for command in commands:
        used = {word for word in command if word.startswith("--")}
        assert used
        assert used <= OPTIONS


def test_memory_and_time_are_above_what_the_server_is_given():
    command = shlex.split(unit()["Service"]["ExecStart"])
    assert parse_bytes(unit()["Service"]["MemoryMax"] + "iB") > parse_bytes(value(command, "--ram"))
    assert int(unit()["Service"]["TimeoutStopSec"]) > int(value(command, "--drain-seconds"))
    service = compose()["services"]["lowtide"]
    assert parse_bytes(service["mem_limit"].upper() + "iB") > parse_bytes(value(service["command"], "--ram"))
    assert int(service["stop_grace_period"].rstrip("s")) > int(value(service["command"], "--drain-seconds"))


def test_the_unit_gives_the_service_little():
    service = unit()["Service"]
    for name in ("DynamicUser", "NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictNamespaces"):
        assert service[name] == "yes"
    assert service["ProtectSystem"] == "strict"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_images_are_made_of_what_is_here_and_run_by_no_root(file):
    text = file.read_text()
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root|0\b)\S+$", final, re.MULTILINE)
    assert "HEALTHCHECK" in final
    assert words("ENTRYPOINT", file)[:2] == ["lowtide", "serve"]


def test_compose_names_what_is_there():
    content = compose()
    built = content["services"]["lowtide"]["build"]
    assert (FOLDER / built["context"]).resolve() == ROOT
    assert (ROOT / built["dockerfile"]).exists()
    for service in content["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in content["volumes"]


def test_prometheus_reads_the_service():
    content = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    (target,) = content["scrape_configs"][0]["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert name in compose()["services"]
    for file in DOCKERFILES:
        assert value(words("ENTRYPOINT", file), "--port") == port
