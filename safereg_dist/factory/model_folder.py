"""Where the files of a model are."""

from pathlib import Path

from safereg_dist.errors import ConfigError, reason_of
from safereg_dist.parallel.comm import Ranks


def resolve_model(model: str, ranks: Ranks) -> Path:
    """Local folder of a path or hub id; the first rank of each node downloads.

    Raises:
        ConfigError: neither a folder nor a hub id that can be fetched.
    Collectives: two gathers of texts, whatever each host has of it.
    """
    with ranks.main_first():
        if Path(model).is_dir():
            return Path(model)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
            return Path(snapshot_download(model, allow_patterns=patterns))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
            raise ConfigError(
                f"model {model!r} is neither a local folder nor a hub id that can be fetched "
                f"({reason_of(err, 200)}): check the path"
            ) from err
