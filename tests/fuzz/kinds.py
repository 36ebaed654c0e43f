"""The kinds of inputs, by name."""

from tests.fuzz import adapter_folders, chats, checkpoints, data_lines, requests
from tests.fuzz.kind import Build

KINDS: dict[str, Build] = {
    "chats": chats.build,
    "adapter folders": adapter_folders.build,
    "data lines": data_lines.build,
    "requests": requests.build,
    "checkpoints": checkpoints.build,
}
