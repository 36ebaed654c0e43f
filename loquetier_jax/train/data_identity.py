"""Which data a job was started on: a hash of its records, and one of what the tokenizer made of them. No jax."""

from loquetier_jax.errors import CheckpointError
from loquetier_jax.train.data import Dataset


def data_identity(data: Dataset | None) -> dict[str, str | None] | None:
    """What a checkpoint remembers of a data set, as JSON data; None of none."""
    return None if data is None else {"records": data.records, "tokens": data.fingerprint}


def check_same_data(name: str, given: Dataset | None, saved: dict[str, str | None] | None) -> None:
    """Checks that a job goes on with the data that it was started on.

    Args:
        name: "data" or "eval_data", for messages.
        given: What it is to go on with; only eval_data may be None.
        saved: From `data_identity`.

    Raises:
        CheckpointError: other data; or the same records, of which this tokenizer makes other tokens.
    """
    got, want = data_identity(given), saved
    if got is None and want is None:
        return
    if got is None:
        raise CheckpointError(f"{name}: got None, expected the job's evaluation data")
    if want is None:
        raise CheckpointError(f"{name}: got data, expected None: the job has none")
    if got["tokens"] == want["tokens"]:
        return
    if got["records"] and got["records"] == want.get("records"):
        raise CheckpointError(
            f"{name}: the records match, but this tokenizer gives different tokens: expected the tokenizer and chat "
            "template that the job was started with"
        )
    hashes = f"got hash {got['tokens']:.12}, expected {want['tokens']:.12}"
    raise CheckpointError(f"{name}: {hashes}: not the data of the job")
