"""JSON that others wrote: whatever is wrong with it is one error."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value that the text describes.

    Raises:
        json.JSONDecodeError: it is no JSON, nested too deeply, has a whole number of thousands of
            digits, or its bytes are no UTF-8.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError as err:
        raise json.JSONDecodeError("nested too deeply", "", 0) from err
    except UnicodeDecodeError as err:
        raise json.JSONDecodeError("not UTF-8", "", 0) from err
    except ValueError as err:  # Python converts 4300 digits at most
        raise json.JSONDecodeError("a number of too many digits", "", 0) from err
