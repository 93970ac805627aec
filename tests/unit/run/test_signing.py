"""Claimed: with a key `safereg ledger verify` holds against who can rewrite ledger and summary, and
keys are refused in one line where they are missing, weak or of another kind.

Exact. The signature of Ed25519 is held against openssl too, where it is installed.
"""

import json
import shutil
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from safereg_dist.cli import main
from safereg_dist.config import SigningConfig
from safereg_dist.errors import ConfigError
from safereg_dist.run.ledger import RankLedger, merge_ledgers
from safereg_dist.storage.signing import checking_key, signing_key, write_signed
from safereg_dist.types import LedgerRow

SECRET = "a secret of enough characters"


def pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """(`signing` of a run, what --key takes) by kind."""
    private = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "private.pem").write_bytes(pem(private))
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "public.pem").write_bytes(public)
    monkeypatch.setenv("SAFEREG_TEST_KEY", SECRET)
    return {
        "hmac": (SigningConfig(hmac_env="SAFEREG_TEST_KEY"), "SAFEREG_TEST_KEY"),
        "ed25519": (
            SigningConfig(ed25519=str(tmp_path / "private.pem")),
            str(tmp_path / "public.pem"),
        ),
    }


def finished(folder, risks, settings):
    """The ledger and the signed summary of a run."""
    folder.mkdir(exist_ok=True)
    with_rows = RankLedger(folder, 0)
    for row, risk in enumerate(risks):
        with_rows.append(
            LedgerRow(
                step=0, micro_batch=0, rank=0, row=row, id=f"row-{row}", risk=risk, kl_coef=0.0,
                divergence=0.0, estimator="column", note=None,
            )
        )  # fmt: skip
    with_rows.close()
    head = merge_ledgers(folder, 1)
    text = json.dumps({"status": "complete", "ledger": {"head": head.head, "rows": head.rows}})
    write_signed(folder / "summary.json", text.encode(), signing_key(settings))


@pytest.mark.parametrize("kind", ["hmac", "ed25519"])
def test_a_ledger_that_was_made_anew_is_found_with_the_key(keys, kind, tmp_path, capsys):
    settings, key = keys[kind]
    run = tmp_path / "run"
    finished(run, [0.9, 0.1], settings)
    assert main(["ledger", "verify", str(run), "--key", key, "--json", "-"]) == 0
    out, said = capsys.readouterr()
    assert "signed: " in said
    assert SECRET not in out + said
    figures = json.loads(out)
    assert (figures["rows"], figures["rank_changes"]) == (2, [])
    last = (run / "ledger.jsonl").read_text().splitlines()[-1]
    assert figures["head"] == json.loads(last)["hash"]
    signature = (run / "summary.json.sig").read_bytes()
    (run / "ledger.jsonl").unlink()
    finished(run, [0.2, 0.1], None)  # another risk, a chain that holds
    assert (run / "summary.json.sig").read_bytes() == signature
    assert main(["ledger", "verify", str(run)]) == 0  # which is why there are keys
    capsys.readouterr()
    assert main(["ledger", "verify", str(run), "--key", key]) == 2
    assert "summary.json was changed or signed with another key" in capsys.readouterr().err
    (run / "summary.json.sig").unlink()
    assert main(["ledger", "verify", str(run), "--key", key]) == 2
    assert "summary.json is not signed" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_checks_the_signature(keys, tmp_path):
    settings, public = keys["ed25519"]
    write_signed(tmp_path / "summary.json", b"{}", signing_key(settings))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    command += ["-in", tmp_path / "summary.json", "-sigfile", tmp_path / "summary.json.sig"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_keys_that_cannot_be_used_are_refused(keys, tmp_path, monkeypatch):
    monkeypatch.setenv("SAFEREG_SHORT", "short")
    (tmp_path / "curve.pem").write_bytes(pem(ec.generate_private_key(ec.SECP256R1())))
    (tmp_path / "text.pem").write_text("-----BEGIN PRIVATE KEY-----\nno\n")
    for given, message in {
        "SAFEREG_SHORT": "16 characters or more .* SAFEREG_SHORT, found 5",
        "SAFEREG_UNSET": "SAFEREG_UNSET, found 0",
        SECRET: "no such file: give the variable's NAME",
        "x" * 300: "no such file",
        str(tmp_path): "cannot be read",
        str(tmp_path / "curve.pem"): "got one of another kind",
        str(tmp_path / "text.pem"): "found none: make one",
    }.items():
        with pytest.raises(ConfigError, match=message) as raised:
            checking_key(given)
        assert SECRET not in str(raised.value)
    with pytest.raises(ConfigError, match="found a public one"):
        signing_key(SigningConfig(ed25519=keys["ed25519"][1]))
    for settings in ({}, {"hmac_env": "SAFEREG_A", "ed25519": "x"}):
        with pytest.raises(ConfigError, match="signing needs one of"):
            SigningConfig(**settings)
    with pytest.raises(ValueError, match="SAFEREG_"):
        SigningConfig(hmac_env="AWS_SECRET_ACCESS_KEY")
