"""The kinds of inputs, by name."""

from tests.fuzz.adapter_folders import AdapterFolders
from tests.fuzz.chats import Chats
from tests.fuzz.checkpoints import Checkpoints
from tests.fuzz.data_lines import DataLines
from tests.fuzz.kind import Build
from tests.fuzz.requests import Requests

KINDS: dict[str, Build] = {
    "chats": Chats,
    "data lines": DataLines,
    "requests": Requests,
    "adapter folders": AdapterFolders,
    "checkpoints": Checkpoints,
}
